"""Trains the denoiser and the text encoder of emoji64 together, on latents that are computed once.

The run takes as many steps as fit into `--minutes`, follows the clock with its learning rate and resumes
from its last checkpoint. Flow matching as Z-Image has it: x = (1 - sigma) x0 + sigma noise, the network
says noise - x0.
"""

import argparse
import os
import time

import emoji_data as data
import numpy as np
import torch
import train_vae
from optimizer import Muon, average_weight, schedule
from PIL import Image
from train_vae import SCALE, SHIFT, save

import networks

COLORS = list(data.BACKGROUNDS)


@torch.no_grad()
def fold_deviation(vae, latents):
    """Scales encoder and decoder so that every normalised latent channel has unit deviation over `latents`.

    The decoder's offset is exact but for the zero padding at the picture's border, where it is below a
    hundredth of a deviation.
    """
    deviation = latents.transpose(0, 1).flatten(1).std(1)
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:16] /= deviation[:, None, None, None]
    out.bias[:16] = (out.bias[:16] - SHIFT) / deviation + SHIFT
    out.weight[16:] = 0
    out.bias[16:] = 2 * np.log(0.1 / SCALE)  # the noise that the decoder was trained for, as log variance
    into.bias += (into.weight.sum((2, 3)) * (SHIFT * (1 - deviation))).sum(1)
    into.weight *= deviation[None, :, None, None]
    return deviation


@torch.no_grad()
def prepare(args):
    """Encodes the pool of pictures once; returns latents [class, kind, variants, 16, 8, 8], sketches last."""
    if os.path.exists(args.latents):
        return torch.load(args.latents, weights_only=True)["latents"]
    vae = train_vae.build()
    vae.load_state_dict(torch.load(args.vae, weights_only=True)["average"])
    pictures = np.stack([p for _, _, p in data.picture_pool(args.variants, args.variants)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([train_vae.encode(vae, part) for part in pixels.split(64)])
    deviation = fold_deviation(vae, latents)
    latents = torch.cat([train_vae.encode(vae, part) for part in pixels.split(64)])
    print("deviation before", deviation, "after", latents.std().item(), "means", latents.mean((0, 2, 3)))
    latents = latents.reshape(len(data.CLASSES), len(COLORS) + 1, args.variants, 16, 8, 8)
    save(args.latents, latents=latents, vae=vae.state_dict())
    return latents


class Batches:
    """Random latents with captions; one caption in ten is empty, for guidance."""

    def __init__(self, latents, tokenizer, rng, sketches=0.12, empty=0.1):
        self.latents, self.tokenizer, self.rng = latents, tokenizer, rng
        self.names, self.sketches, self.empty = list(data.CLASSES), sketches, empty

    def draw(self, size):
        """Latents, token ids and lengths of one batch."""
        rng, chosen, captions = self.rng, [], []
        for _ in range(size):
            which = rng.integers(len(self.names))
            kind = len(COLORS) if rng.random() < self.sketches else rng.integers(len(COLORS))
            chosen.append(self.latents[which, kind, rng.integers(self.latents.shape[2])])
            color = None if kind == len(COLORS) else COLORS[kind]
            captions.append("" if rng.random() < self.empty else data.caption(self.names[which], color, rng))
        return torch.stack(chosen), *networks.tokenize(self.tokenizer, captions, 20)


def loss_of(model, encoder, batch, block):
    """Squared error of the velocity at logit-normal sigmas, a few of them uniform so that the ends are seen."""
    latents, ids, lengths = batch
    count = len(latents)
    sigma = torch.where(torch.rand(count) < 0.15, torch.rand(count), torch.sigmoid(torch.randn(count) + 0.2))
    noise = torch.randn_like(latents)
    mix = sigma[:, None, None, None]
    states = networks.text_states(encoder, ids)
    out = networks.fast_velocity(model, latents * (1 - mix) + noise * mix, sigma, states, lengths, block)
    return (out - (noise - latents)).square().mean()


@torch.no_grad()
def sheet(model, encoder, tokenizer, vae, path, captions, cfg=3.5, steps=20):
    """Draws one picture per caption, 12 in a row, and writes them as a PNG."""
    states = networks.text_states(encoder, networks.tokenize(tokenizer, captions)[0])
    lengths = networks.tokenize(tokenizer, captions)[1]
    ids, length = networks.tokenize(tokenizer, [""])
    noise = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = networks.sample(model, states, lengths, (networks.text_states(encoder, ids), length), noise, steps, cfg)
    pixels = ((train_vae.decode(vae, latents).clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pixels[i : i + 12]), 1) for i in range(0, len(pixels) // 12 * 12, 12)]
    Image.fromarray(np.concatenate(rows)).resize((12 * 128, len(rows) * 128), Image.BILINEAR).save(path)


def sample_captions():
    """Every second class with the backgrounds in turn, then line drawings and words the model never saw."""
    names = list(data.CLASSES)
    plain = [f"a {name} on a {COLORS[i % 6]} background" for i, name in enumerate(names[::2][:36])]
    return (
        plain
        + [f"a line drawing of a {n}" for n in names[1::12][:6]]
        + [f"blueprint of a {n}" for n in names[3::12][:6]]
    )


def load_vae(path):
    vae = train_vae.build()
    vae.load_state_dict(torch.load(path, weights_only=True)["vae"])
    return vae


def make_optimizer(model, encoder, lr):
    """Muon for the matrices inside the blocks, Adam for modulation, embeddings, input and output."""
    named = [*model.named_parameters(), *encoder.named_parameters(prefix="text")]
    outside = ("adaLN", "t_embedder", "x_embedder", "final_layer", "embed_tokens", "pad_token")
    inner = [p for n, p in named if p.ndim == 2 and not any(word in n for word in outside)]
    return Muon(inner, [p for n, p in named if not any(p is q for q in inner)], lr=lr, lr_others=1.5e-3, momentum=0.95)


def train(args):
    latents = prepare(args)
    if not os.path.exists(os.path.join(args.tokenizer, "tokenizer.json")):
        networks.build_tokenizer(args.tokenizer)
    tokenizer, vae = networks.load_tokenizer(args.tokenizer), load_vae(args.latents)
    pair = torch.nn.ModuleList([networks.build_denoiser(), networks.build_text_encoder(len(tokenizer))])
    average = torch.nn.ModuleList([networks.build_denoiser(), networks.build_text_encoder(len(tokenizer))])
    average.requires_grad_(False)
    optimizer = make_optimizer(*pair, args.lr)
    step, spent = 0, 0.0
    if os.path.exists(args.checkpoint):
        state = torch.load(args.checkpoint, weights_only=True)
        pair.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    else:
        average.load_state_dict(pair.state_dict())
    block = torch.compile(networks.fast_block, dynamic=False) if args.compile else networks.fast_block
    batches = Batches(latents, tokenizer, np.random.default_rng(step))
    begin, saved, drawn, losses = time.time() - spent, time.time(), time.time(), []
    while (fraction := (time.time() - begin) / 60 / args.minutes) < 1:
        loss = loss_of(*pair, batches.draw(args.batch), block)
        loss.backward()
        optimizer.step(schedule(fraction))
        step += 1
        losses.append(loss.item())
        torch._foreach_lerp_(
            list(average.parameters()), [p.data for p in pair.parameters()], 1 - average_weight(step, 0.998)
        )
        if step % 50 == 0:
            print(
                f"step {step} loss {np.mean(losses[-50:]):.4f} fraction {fraction:.3f} {time.strftime('%H:%M:%S')}",
                flush=True,
            )
        if time.time() - saved > 180:
            saved = time.time()
            save(
                args.checkpoint,
                model=pair.state_dict(),
                average=average.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                spent=time.time() - begin,
            )
        if time.time() - drawn > 60 * args.draw_every:
            drawn = time.time()
            sheet(*average, tokenizer, vae, args.checkpoint + ".png", sample_captions())
    save(
        args.checkpoint,
        model=pair.state_dict(),
        average=average.state_dict(),
        optimizer=optimizer.state_dict(),
        step=step,
        spent=time.time() - begin,
    )
    sheet(*average, tokenizer, vae, args.checkpoint + ".png", sample_captions())
    print("done", step, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", default="vae.pt", help="checkpoint of train_vae.py")
    parser.add_argument("--latents", default="latents.pt", help="the cache, made if missing; holds the scaled VAE too")
    parser.add_argument("--tokenizer", default="tokenizer", help="folder, made if missing")
    parser.add_argument("--checkpoint", default="denoiser.pt")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--variants", type=int, default=12, help="pictures per class and background")
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--draw-every", type=float, default=8, help="minutes between sheets of samples")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    torch.set_num_threads(2)
    train(parser.parse_args())
