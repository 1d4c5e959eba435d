"""The most memory that each bucket needed on the device, step by step; nothing where a device does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from library.batches import Batch

SHOWN = 12  # buckets in the report, those that need most


def counter(device: Any) -> Any:
    """The module that counts the bytes of an accelerator, or None."""
    import torch

    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "reset_peak_memory_stats") else None


class Peaks:
    """`begin` before a step, `end` after it: both ask the allocator of this process and do not wait for the device."""

    def __init__(self, device: Any) -> None:
        self.counter, self.device = counter(device), device
        self.by_bucket: dict[str, int] = {}  # bytes
        self.seen = 0  # the most so far, which the counter forgets at every step

    def begin(self) -> None:
        if self.counter is not None:
            self.seen = self.highest()
            self.counter.reset_peak_memory_stats(self.device)

    def end(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """What a line of the log says besides; of several batches in a step the largest is named."""
        sizes = {_name(batch): batch.pictures.numel() for batch in batches}
        if self.counter is None or not sizes:
            return {}
        bucket, peak = max(sizes, key=sizes.__getitem__), self.counter.max_memory_allocated(self.device)
        self.by_bucket[bucket] = max(peak, self.by_bucket.get(bucket, 0))
        return {"bucket": bucket, "peak_bytes": peak}

    def highest(self) -> int | None:
        """Of the whole run; None where that is not counted."""
        return None if self.counter is None else max(self.seen, self.counter.max_memory_allocated(self.device))

    def facts(self) -> dict[str, str]:
        """For the report."""
        most = sorted(self.by_bucket.items(), key=lambda pair: -pair[1])[:SHOWN]
        return {f"memory, most in training with {bucket}": f"{peak / 1e9:.2f} GB" for bucket, peak in most}


def _name(batch: Batch) -> str:
    return f"{len(batch.items)} x {'x'.join(map(str, batch.items[0].bucket))}"
