"""What is known of a launch where no GPU is: its grid, and whose device was the current one."""

import contextlib

import torch


class Launches:
    """Kernels of a module that note `(device of the guard or None, grid)` before they run, or instead of it."""

    def __init__(self, monkeypatch, module, *names, run=True):
        self.seen, self.guard = [], None
        monkeypatch.setattr(torch.cuda, "device_of", self._device_of)
        for name in names:
            monkeypatch.setattr(module, name, _Noted(self, getattr(module, name), run))

    @contextlib.contextmanager
    def _device_of(self, tensor):
        before, self.guard = self.guard, tensor.device
        yield
        self.guard = before


class _Noted:
    def __init__(self, launches, kernel, run):
        self.launches, self.kernel, self.run = launches, kernel, run

    def __getitem__(self, grid):
        self.launches.seen.append((self.launches.guard, grid))
        return self.kernel[grid] if self.run else lambda *_, **__: None


def far_apart(path, shape, strides, dtype):
    """Random values in a file that is mostly holes, so that they can be further apart than memory is large."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    whole = torch.from_file(str(path / "sparse"), shared=True, size=size, dtype=dtype)
    return whole.as_strided(shape, strides).copy_(torch.randn(shape))
