"""Third-party network modules, called as train_network.py calls them. They are not installed with the test extra."""

import pytest
import torch
from networks_support import images, tiny


@pytest.mark.parametrize("algorithm", ["lokr", "loha"])
def test_lycoris_trains_on_our_modules(tmp_path, algorithm):
    lycoris = pytest.importorskip("lycoris.kohya", reason="lycoris-lora is not installed")
    model = tiny(dim=64)
    base = model(images())
    network = lycoris.create_network(1.0, 2, 1.0, None, [], model, neuron_dropout=None, algo=algorithm)
    network.apply_to([], model, False, True)
    network.prepare_grad_etc([], model)
    groups = network.prepare_optimizer_params(None, 1e-2, 1e-2)
    optimizer = torch.optim.AdamW(groups[0] if isinstance(groups, tuple) else groups)
    network.on_epoch_start([], model)
    for _ in range(3):
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(images()), base)
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {"ss_x": "1"})
    assert (tmp_path / "x.safetensors").stat().st_size > 0
