"""What stands in for sgl_kernel on a CPU? The registry's build is CUDA kernels, and SGLang imports it all the same.

Every module and every name in it can be imported; a kernel that is called raises. With --attention-backend torch_native
SGLang calls none. What SGLang's schedulers use of torch.cuda and of pinned memory does nothing where there is no CUDA.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
import types

import torch

__version__ = "9.9.9"  # SGLang asks for a lowest version


class _Kernel:
    def __init__(self, name):
        self.__name__ = name

    def __call__(self, *_args, **_options):
        raise NotImplementedError(f"{self.__name__}: this sgl_kernel is a stand-in without any kernel")


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        # SGLang asks whether scalar_type is there, and has its own when it is not.
        if not name.startswith("sgl_kernel.") or name == "sgl_kernel.scalar_type":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


class _Event:
    """A torch.cuda.Event of work that is always done."""

    def __init__(self, *_args, **_options):
        pass

    def record(self, *_args, **_options):
        pass

    def wait(self, *_args, **_options):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class _Stream:
    """A torch.cuda.Stream on which nothing is ever waited for."""

    def synchronize(self):
        pass

    def wait_stream(self, _stream):
        pass

    def wait_event(self, _event):
        pass

    def record_event(self, event=None):
        return event or _Event()


def _without_pinned_memory(create):
    @functools.wraps(create)
    def wrapper(*args, pin_memory=False, **options):
        return create(*args, **options)

    return wrapper


def _do_without_cuda():
    torch.empty = _without_pinned_memory(torch.empty)
    torch.Tensor.pin_memory = lambda tensor, *_args, **_options: tensor
    torch.cuda.Event = _Event
    torch.cuda.current_stream = lambda *_args, **_options: _Stream()


sys.meta_path.append(_Finder())
sys.modules[__name__].__class__ = _Module
if not torch.cuda.is_available():
    _do_without_cuda()
