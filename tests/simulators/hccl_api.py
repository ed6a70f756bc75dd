"""Call the C API of the simulated HCCL on a communicator of one rank, without torch; prints what it answers as JSON.

Arguments: the folder of the built libraries. The chip is NPU_SIM_SOC. Run by test_npu_hccl_api.py.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path

DTYPES = {"int8": 0, "int16": 1, "int32": 2, "fp16": 3, "fp32": 4, "int64": 5, "uint64": 6, "uint8": 7, "uint16": 8}
DTYPES |= {"uint32": 9, "fp64": 10, "bf16": 11, "int128": 12, "hif8": 14, "fp8e4m3": 15, "fp8e5m2": 16, "fp8e8m0": 17}
SUM, MAX = 0, 2
ROOT_INFO_BYTES = 4108

folder = Path(sys.argv[1])
runtime = ctypes.CDLL(str(folder / "libascendcl.so"), mode=ctypes.RTLD_GLOBAL)
hccl = ctypes.CDLL(str(folder / "libhccl.so"))
runtime.aclGetRecentErrMsg.restype = c_char_p


def answer(result: int) -> str:
    """ "" for success, else the code and the text that torch_npu would put into its exception."""
    text = runtime.aclGetRecentErrMsg() or b""
    return "" if result == 0 else f"{result}: {text.decode()}"


def make() -> c_void_p:
    """A communicator of this process alone."""
    runtime.aclInit(None)
    runtime.aclrtSetDevice(0)
    info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
    communicator = c_void_p()
    assert hccl.HcclGetRootInfo(info) == 0
    assert answer(hccl.HcclCommInitRootInfo(c_uint32(1), info, c_uint32(0), byref(communicator))) == ""
    return communicator


class Calls:
    """The collectives over two elements of a buffer."""

    def __init__(self, communicator: c_void_p) -> None:
        self.communicator, self.count = communicator, c_uint64(2)
        self.input, self.output = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
        self.counts, self.offsets = (c_uint64 * 1)(2), (c_uint64 * 1)(0)

    def all_reduce(self, dtype: int, reduction: int = SUM) -> int:
        """HcclAllReduce."""
        return int(hccl.HcclAllReduce(self.input, self.output, self.count, dtype, reduction, self.communicator, None))

    def reduce(self, dtype: int, root: int = 0) -> int:
        """HcclReduce."""
        call, root_rank = hccl.HcclReduce, c_uint32(root)
        return int(call(self.input, self.output, self.count, dtype, SUM, root_rank, self.communicator, None))

    def reduce_scatter(self, dtype: int) -> int:
        """HcclReduceScatter."""
        return int(hccl.HcclReduceScatter(self.input, self.output, self.count, dtype, SUM, self.communicator, None))

    def reduce_scatter_v(self, dtype: int) -> int:
        """HcclReduceScatterV."""
        call, counts, offsets = hccl.HcclReduceScatterV, self.counts, self.offsets
        return int(
            call(self.input, counts, offsets, self.output, self.count, dtype, SUM, self.communicator, c_void_p())
        )

    def all_gather(self, dtype: int) -> int:
        """HcclAllGather."""
        return int(hccl.HcclAllGather(self.input, self.output, self.count, dtype, self.communicator, None))

    def all_gather_v(self, dtype: int, count: int = 2) -> int:
        """HcclAllGatherV."""
        call, counts, offsets = hccl.HcclAllGatherV, self.counts, self.offsets
        return int(
            call(self.input, c_uint64(count), self.output, counts, offsets, dtype, self.communicator, c_void_p())
        )

    def broadcast(self, dtype: int, root: int = 0) -> int:
        """HcclBroadcast."""
        return int(hccl.HcclBroadcast(self.input, self.count, dtype, c_uint32(root), self.communicator, None))

    def scatter(self, dtype: int) -> int:
        """HcclScatter."""
        call = hccl.HcclScatter
        return int(call(self.input, self.output, self.count, dtype, c_uint32(0), self.communicator, None))

    def all_to_all(self, dtype: int, other: int | None = None) -> int:
        """HcclAlltoAll."""
        call, received = hccl.HcclAlltoAll, dtype if other is None else other
        return int(
            call(self.input, self.count, dtype, self.output, self.count, received, self.communicator, c_void_p())
        )


def misuse(calls: Calls) -> dict[str, str]:
    """Answers to calls that no caller may make."""
    fp32, nothing = DTYPES["fp32"], c_void_p()
    found = {
        "reduction 7": answer(calls.all_reduce(fp32, 7)),
        "root 1": answer(calls.broadcast(fp32, 1)),
        "reduce root 1": answer(calls.reduce(fp32, 1)),
        "own count": answer(calls.all_gather_v(fp32, 1)),
        "two dtypes": answer(calls.all_to_all(fp32, DTYPES["int32"])),
        "null buffer": answer(
            hccl.HcclAllReduce(nothing, calls.output, calls.count, fp32, SUM, calls.communicator, nothing)
        ),
        "send to itself": answer(hccl.HcclSend(calls.input, calls.count, fp32, c_uint32(0), calls.communicator, None)),
        "send to rank 1": answer(hccl.HcclSend(calls.input, calls.count, fp32, c_uint32(1), calls.communicator, None)),
        "group end alone": answer(hccl.HcclGroupEnd()),
        "other setting": answer(hccl.HcclSetConfig(c_int(1), c_int(0))),
    }
    found["destroy"] = answer(hccl.HcclCommDestroy(calls.communicator))
    found["after destroy"] = answer(calls.all_reduce(fp32))
    found["destroy twice"] = answer(hccl.HcclCommDestroy(calls.communicator))
    return found


def main() -> None:
    """Every collective with every dtype, then what is refused."""
    calls = Calls(make())
    names = [name for name in vars(Calls) if not name.startswith("_")]
    found = {name: {dtype: answer(getattr(calls, name)(number)) for dtype, number in DTYPES.items()} for name in names}
    drained = answer(runtime.aclrtSynchronizeStream(None))
    print(json.dumps({"calls": found, "drained": drained, "misuse": misuse(calls)}))


if __name__ == "__main__":
    main()
