"""How compiled Triton kernels are launched."""

from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia import driver

from gnunet.ops.arguments import NormArgs
from gnunet.ops.triton_kernels import common
from gnunet.ops.triton_kernels.launch import Launch, _Executable, launch_call, plan_backward, plan_forward


def launcher(calls: list, **scratch: int) -> object:
    """Triton's own, but for the C function."""
    made = object.__new__(driver.CudaLauncher)
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0) | scratch
    vars(made).update(sizes, global_scratch_align=1, profile_scratch_align=1, num_ctas=1)
    vars(made).update(launch_cooperative_grid=False, launch_pdl=True, arg_annotations=[3], kernel_signature=b"4")
    vars(made).update(launch=lambda *args: calls.append(args))
    return made


def test_the_c_function_is_given_what_tritons_launcher_gives_it():
    calls: list = []
    compiled = SimpleNamespace(run=launcher(calls), function=7, packed_metadata=(8, 1))
    compiled.run(5, 1, 1, 9, 7, (8, 1), None, None, None, 64, "two")
    launch, before, after, is_packed = launch_call(compiled, 5, 2)
    assert len(calls) == 1 and launch is compiled.run.launch
    launch(*before, 9, *after, *([(64, "two")] if is_packed else [64, "two"]))
    assert calls[0] == calls[1]


def test_a_launcher_that_allocates_memory_is_called_itself():
    compiled = SimpleNamespace(run=launcher([], global_scratch_size=64), function=7, packed_metadata=(8, 1))
    launch, before, after, is_packed = launch_call(compiled, 5, 2)
    assert (launch, before, after, is_packed) == (compiled.run, (5, 1, 1), (7, (8, 1), None, None, None), False)


def test_a_launcher_with_a_call_of_another_form_is_called_itself():
    class Launcher:
        global_scratch_size = profile_scratch_size = 0

        def __call__(self, *args):
            self.launch([args])

        def launch(self, args): ...

    compiled = SimpleNamespace(run=Launcher(), function=7, packed_metadata=(8, 1))
    assert launch_call(compiled, 5, 2).launch is compiled.run


@pytest.mark.parametrize("is_packed", [False, True])
def test_kernels_are_launched_directly_where_tensors_are_aligned(monkeypatch, is_packed):
    by_triton, direct, streams = [], [], iter((11, 12, 13))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: next(streams), raising=False)

    class Launcher:
        global_scratch_size = profile_scratch_size = 0

        def __call__(self, x, y, z, stream, function, metadata, *rest):
            arguments = rest[3:]
            self.launch(x, y, z, stream, function, *([arguments] if is_packed else arguments))

        def launch(self, *args):
            direct.append(args)

    class Kernel:
        arg_names = ("x_ptr", "bias_ptr", "positions")

        def __getitem__(self, grid):
            def launch(*args, **options):
                by_triton.append((grid, args, options))
                return SimpleNamespace(run=Launcher(), function="code", packed_metadata=())

            return launch

    launch = Launch(Kernel(), 6, {"num_warps": 4}, ("x", "bias"), (64,))
    execute = _Executable([launch], ("bias", "x"), 0)
    whole = torch.zeros(64)
    aligned, unaligned = whole[4:], whole[5:]
    for x in (aligned, aligned, unaligned, aligned):
        execute((None, x))
    assert [args[0].data_ptr() for _, args, _ in by_triton] == [aligned.data_ptr(), unaligned.data_ptr()]
    assert by_triton[0] == ((6,), (aligned, None, 64), {"num_warps": 4})
    arguments = (aligned.data_ptr(), 0, 64)
    assert direct == [(6, 1, 1, s, "code", *([arguments] if is_packed else arguments)) for s in (11, 12)]


@pytest.mark.parametrize(("channels", "size"), [(64, 4), (64, 64)])
def test_no_kernel_is_compiled_for_a_batch_size(channels, size):
    def plans(samples):
        x, table = torch.zeros(samples, channels, size, size), torch.zeros(samples, channels)
        args = NormArgs(x, *torch.zeros(2, channels), table, table, table, 8, 1e-5, True, True)
        return [*plan_forward(args).launches, *plan_backward(args, [True] * 6).launches]

    for one, many in zip(plans(1), plans(300), strict=True):
        names = one.kernel.arg_names[len(one.tensors) :]
        of_batch = {n for n, a, b in zip(names, one.values, many.values, strict=True) if a != b}
        assert one.kernel is many.kernel and of_batch - {"BLOCK_K"} <= set(common.BATCH_DEPENDENT_ARGS)
