"""torch.distributed: groups of one process, named as CUDA scripts name them."""

# ruff: noqa: E501 - a line of a probe stays a line

from __future__ import annotations

from transfer_probes.probe import Raises, group

__all__ = ["PROBES"]

_START = (
    "import torch.distributed as dist, socket\nwith socket.socket() as s:\n    s.bind(('127.0.0.1', 0))\n    port = s.getsockname()[1]\n"
    "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')\ntorch.cuda.set_device(0)\n"
)
_GROUP = _START + "dist.init_process_group('nccl')\nx = torch.ones(2, device='cuda')\n"
_DDP = "from torch.nn.parallel import DistributedDataParallel as DDP\n"

PROBES = group(
    "torch.distributed",
    ("import torch.distributed as dist\ndist.is_nccl_available()",),
    ("import torch.distributed as dist\ndist.is_backend_available('nccl')",),
    ("import torch.distributed as dist\ndist.get_default_backend_for_device('cuda') is not None",),
    (_GROUP + "dist.all_reduce(x)\nx.tolist()", [1.0, 1.0]),
    (_START + "dist.init_process_group(backend='nccl', init_method='env://')\ndist.is_initialized()",),
    (_START + "dist.init_process_group(backend=dist.Backend.NCCL)\ndist.is_initialized()",),
    (
        _START + "dist.init_process_group('cpu:gloo,cuda:nccl')\nx = torch.ones(1, device='cuda')\ny = torch.ones(1)\n"
        "dist.all_reduce(x)\ndist.all_reduce(y)\n(x.item(), y.item())",
        (1.0, 1.0),
    ),
    (_START + "dist.init_process_group()\nx = torch.ones(1, device='cuda')\ndist.all_reduce(x)\nx.item()", 1.0),
    (_START + "dist.init_process_group('nccl', device_id=torch.device('cuda:0'))\ndist.is_initialized()",),
    (_START + "dist.init_process_group('nccl', device_id=torch.device('cuda', 0))\ndist.barrier()", None),
    (_START + "dist.init_process_group('nccl', device_id=0)\ndist.is_initialized()",),
    (
        _START
        + "dist.init_process_group('nccl', store=dist.FileStore(folder + '/nccl_store', 1), rank=0, world_size=1)\ndist.is_initialized()",
    ),
    (
        _START
        + "dist.init_process_group('nccl', init_method='file://' + folder + '/nccl_file', rank=0, world_size=1)\ndist.is_initialized()",
    ),
    (_GROUP + "dist.get_backend()", "nccl"),
    (_GROUP + "dist.get_backend() == dist.Backend.NCCL",),
    (_GROUP + "dist.get_backend(dist.new_group([0], backend='nccl')) == dist.get_backend()",),
    (_GROUP + "g = dist.new_group([0], backend='gloo')\ny = torch.ones(1)\ndist.all_reduce(y, group=g)\ny.item()", 1.0),
    (_GROUP + "dist.barrier(device_ids=[0])", None),
    (_GROUP + "w = dist.all_reduce(x, async_op=True)\nw.wait()\nx.tolist()", [1.0, 1.0]),
    (
        _GROUP
        + "y = torch.empty(2, device='cuda')\ndist.all_gather_into_tensor(y, x)\ndist.reduce_scatter_tensor(x, y)\nx.tolist()",
        [1.0, 1.0],
    ),
    (_GROUP + "y = [None]\ndist.all_gather_object(y, {'device': 'cuda'})\ny", [{"device": "cuda"}]),
    (_GROUP + "y = ['cuda:0']\ndist.broadcast_object_list(y, 0, device=torch.device('cuda'))\ny", ["cuda:0"]),
    (_GROUP + "dist.gather(x, y := [torch.empty_like(x)], dst=0)\ny[0].tolist()", [1.0, 1.0]),
    (
        _GROUP + "dist.gather(x, y := [torch.empty_like(x)], group_dst=0)\ny[0].tolist()",
        [1.0, 1.0],
        "torch_npu replaces gather by one of an older signature",
    ),
    (
        "import torch.distributed as dist\no = dist.ProcessGroupNCCL.Options()\no.is_high_priority_stream = True\no.is_high_priority_stream",
    ),
    (
        "import torch.distributed as dist\ndist.ProcessGroupNCCL.Options(is_high_priority_stream=True).is_high_priority_stream",
    ),
    (
        "import torch.distributed as dist\no = dist.ProcessGroupNCCL.Options()\no.config.max_ctas = 8\no.config.max_ctas",
        8,
    ),
    (
        _GROUP
        + "o = dist.ProcessGroupNCCL.Options()\no.config.cga_cluster_size = 2\ng = dist.new_group([0], backend='nccl', pg_options=o)\n"
        "dist.all_reduce(x, group=g)\nx.tolist()",
        [1.0, 1.0],
    ),
    (
        "from torch.distributed import ProcessGroupNCCL\nProcessGroupNCCL.Options().config.no_such_field",
        Raises("AttributeError"),
    ),
    (
        _GROUP
        + _DDP
        + "m = DDP(torch.nn.Linear(2, 2).cuda(), device_ids=[0], output_device=0)\nm(x).sum().backward()\nm.module.weight.grad.is_cuda",
    ),
    (_GROUP + _DDP + "m = DDP(torch.nn.Linear(2, 2).cuda(), device_ids=[torch.device('cuda:0')])\nm(x).is_cuda",),
    (_GROUP + _DDP + "m = DDP(torch.nn.Linear(2, 2).cuda(), device_ids=['cuda:0'])\nm(x).is_cuda",),
    (
        _GROUP + "from torch.distributed.fsdp import FullyShardedDataParallel as FSDP\n"
        "m = FSDP(torch.nn.Linear(2, 2), device_id=torch.cuda.current_device())\nm(x).sum().backward()\nTrue",
    ),
    (
        _GROUP
        + "from torch.distributed.fsdp import fully_shard\nm = fully_shard(torch.nn.Linear(2, 2).cuda())\nm(x).sum().backward()\nm.weight.is_cuda",
    ),
    (
        _GROUP
        + "from torch.distributed.device_mesh import init_device_mesh\nm = init_device_mesh('cuda', (1,), mesh_dim_names=('dp',))\n"
        "dist.all_reduce(x, group=m.get_group('dp'))\nx.tolist()",
        [1.0, 1.0],
    ),
    (_GROUP + "from torch.distributed.device_mesh import DeviceMesh\nDeviceMesh('cuda', [0]).size()", 1),
    (
        _GROUP
        + "from torch.distributed.device_mesh import init_device_mesh\ninit_device_mesh('cuda', (1,)).device_type",
        "cuda",
        "torch makes tensors and groups of the mesh's device by this word",
    ),
    (
        _GROUP + "from torch.distributed.tensor import DTensor, Shard, init_device_mesh, distribute_tensor\n"
        "distribute_tensor(x, init_device_mesh('cuda', (1,)), [Shard(0)]).to_local().is_cuda",
    ),
    (_GROUP + "dist.destroy_process_group()\ndist.is_initialized()", False),
    (_GROUP + "dist.distributed_c10d._get_default_group()._get_backend(torch.device('cuda')) is not None",),
)
