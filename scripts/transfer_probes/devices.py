"""The word cuda, wherever CUDA scripts write it: as a device, and where it is none."""

# ruff: noqa: E501 - a line of a probe stays a line

from __future__ import annotations

from transfer_probes.probe import Raises, group

__all__ = ["PROBES"]

_X = "x = torch.ones(4, device='cuda')\n"
_SAVE = "torch.save({'w': torch.ones(3, device='cuda')}, %r)\n"
_WRITTEN_BY_CUDA = """import zipfile
torch.save(torch.ones(2), 'here.pt')
with zipfile.ZipFile('here.pt') as here, zipfile.ZipFile('from_cuda.pt', 'w') as there:
    for name in here.namelist():
        data = here.read(name).replace(b'X\\x03\\x00\\x00\\x00cpu', b'X\\x06\\x00\\x00\\x00cuda:%d')
        there.writestr(name, data)
"""
_C_TYPE = "torch.device is a C type that cannot be subclassed, and torch itself chooses kernels by it"

PROBES = [
    *group(
        "device strings and objects",
        ("torch.zeros(2, device='cuda').is_cuda",),
        ("torch.zeros(2, device='cuda:0').get_device()", 0),
        ("torch.zeros(2, device=0).is_cuda",),
        ("torch.zeros(2, device=torch.device('cuda')).is_cuda",),
        ("torch.tensor([1.0], device=torch.device('cuda', 0)).is_cuda",),
        ("torch.ones(2).to('cuda:0').is_cuda",),
        ("torch.ones(2).to(device='cuda', dtype=torch.float16).is_cuda",),
        ("torch.ones(2).to(0).is_cuda",),
        ("torch.ones(2).to(torch.device('cuda:0'), torch.bfloat16, non_blocking=True, copy=True).is_cuda",),
        ("torch.ones(2).to(torch.device(0)).is_cuda",),
        ("torch.ones(2).cuda().is_cuda",),
        ("torch.ones(2).cuda(0, non_blocking=True).is_cuda",),
        ("torch.ones(2).cuda(device='cuda:0').is_cuda",),
        ("torch.ones(2).cuda(torch.device('cuda')).is_cuda",),
        ("torch.ones(2).cuda(torch.cuda.current_device()).is_cuda",),
        (
            _X
            + "torch.zeros_like(torch.ones(2), device='cuda').is_cuda and torch.randn_like(torch.ones(2), device=x.device).is_cuda",
        ),
        ("torch.ones(2).new_zeros(3, device='cuda').is_cuda",),
        ("torch.ones(2).new_tensor([1.0], device='cuda:0').is_cuda",),
        ("torch.as_tensor([1], device='cuda').is_cuda and torch.asarray([1], device='cuda').is_cuda",),
        ("torch.full((2,), 1.0, device='cuda').is_cuda and torch.arange(3, device='cuda').is_cuda",),
        ("torch.linspace(0, 1, 3, device='cuda').is_cuda and torch.eye(2, device='cuda').is_cuda",),
        ("torch.empty_strided((2, 2), (2, 1), device='cuda').is_cuda",),
        ("torch.tril_indices(2, 2, device='cuda').is_cuda and torch.hann_window(4, device='cuda').is_cuda",),
        ("torch.fft.fftfreq(4, device='cuda').is_cuda",),
        ("torch.normal(0.0, 1.0, (2,), device='cuda').is_cuda",),
        ("torch.ones(2).type('torch.cuda.FloatTensor').is_cuda",),
        ("torch.cuda.FloatTensor([1.0, 2.0]).is_cuda",),
        ("torch.cuda.LongTensor(2).zero_().tolist()", [0, 0]),
        ("torch.cuda.DoubleTensor is not torch.cuda.FloatTensor",),
        ("isinstance(torch.ones(2, device='cuda'), torch.cuda.FloatTensor)",),
        ("torch.nn.Linear(2, 2).to('cuda').weight.is_cuda",),
        ("torch.nn.Linear(2, 2).to(device=torch.device('cuda'), dtype=torch.bfloat16).weight.is_cuda",),
        ("torch.nn.Linear(2, 2).cuda().weight.is_cuda and torch.nn.Linear(2, 2).cuda(0).weight.is_cuda",),
        ("torch.nn.Linear(2, 2, device='cuda').weight.is_cuda",),
        ("torch.nn.Linear(2, 2, device='meta').to_empty(device='cuda').weight.is_cuda",),
        ("torch.nn.Embedding(3, 2, device=torch.device('cuda:0'), dtype=torch.float16).weight.is_cuda",),
        (
            "with torch.device('cuda'):\n    x = torch.ones(2)\n    m = torch.nn.Linear(2, 2)\nx.is_cuda and m.weight.is_cuda",
        ),
        (
            "torch.set_default_device('cuda')\nx = torch.ones(2)\ny = torch.get_default_device()\n(x.is_cuda, y == torch.device('cuda:0'))",
            (True, True),
        ),
        ("torch.set_default_device(torch.device('cuda:0'))\ntorch.ones(2).is_cuda",),
        ("torch.get_device_module('cuda') is torch.cuda",),
        ("torch.ones(2).pin_memory('cuda').is_pinned()",),
        ("torch.ones(2).pin_memory().is_pinned()",),
        ("torch.empty(2, pin_memory=True).is_pinned()",),
        ("torch.nn.utils.rnn.pack_padded_sequence(torch.ones(2, 1, 1), torch.tensor([2])).to('cuda').data.is_cuda",),
        (
            "torch.UntypedStorage(4, device='cuda').device.index",
            0,
            "it inherits __new__, which Python cannot give back: no undo",
        ),
        ("torch.ones(2).untyped_storage().cuda().is_cuda",),
        ("torch.sparse_coo_tensor([[0]], [1.0], (2,), device='cuda').is_cuda",),
        ("torch.ones(2, device='cuda').cpu().is_cuda", False),
        (
            "from enum import Enum\nclass Device(str, Enum):\n    GPU = 'cuda'\ntorch.zeros(1, device=Device.GPU).is_cuda",
        ),
        ("import functools\nfunctools.partial(torch.zeros, 2, device='cuda')().is_cuda",),
        ("torch.nn.functional.one_hot(torch.arange(2, device='cuda')).is_cuda",),
        ("torch.accelerator.current_accelerator() == torch.device('cuda')",),
        ("torch._utils._get_device_index('cuda:0')", 0),
        ("torch.zeros(1, device=str(torch.device('cuda:0'))).is_cuda",),
    ),
    *group(
        "comparisons",
        (_X + "x.is_cuda",),
        (_X + "x.device == torch.device('cuda:0')",),
        (_X + "x.device == torch.device('cuda', torch.cuda.current_device())",),
        (_X + "torch.device('cuda') == torch.device(x.device.type)",),
        (_X + "x.device in {torch.device('cuda:0'): 1}",),
        (_X + "x.device.type == 'cuda'", True, _C_TYPE),
        (_X + "str(x.device) == 'cuda:0'", True, _C_TYPE),
        ("torch.device('cuda').type == 'cuda'", True, _C_TYPE),
        (_X + "x.device.index", 0),
        (_X + "isinstance(x.device, torch.device) and isinstance(torch.device('cuda'), torch.device)",),
        (_X + "x.type() == 'torch.cuda.FloatTensor'",),
        (_X + "'cuda' in x.type()",),
        (_X + "x.is_cuda != torch.ones(1).is_cuda",),
        ("torch.nn.Parameter(torch.ones(1, device='cuda')).is_cuda",),
        ("class T(torch.Tensor):\n    pass\ntorch.ones(1, device='cuda').as_subclass(T).is_cuda",),
        (_X + "x.untyped_storage().is_cuda",),
        ("next(torch.nn.Linear(1, 1).cuda().parameters()).device == torch.device('cuda:0')",),
        (_X + "{t.device for t in (x, torch.ones(1).cuda())} == {torch.device('cuda', 0)}",),
        ("import pickle\npickle.loads(pickle.dumps(torch.device('cuda:0'))) == torch.device('cuda:0')",),
        ("import copy\ncopy.deepcopy(torch.device('cuda', 0)) == torch.device('cuda', 0)",),
        (_X + "x.device.type in ('cuda', 'npu') and torch.device(type='cuda', index=0) == x.device",),
    ),
    *group(
        "strings that are no devices",
        (_SAVE % "my_cuda_model.pt" + "torch.load('my_cuda_model.pt')['w'].tolist()", [1.0, 1.0, 1.0]),
        (_SAVE % "m.pt" + "torch.load(os.path.join(folder, 'm.pt'), 'cuda')['w'].is_cuda",),
        ("torch.save(torch.ones(1), 'cuda')\ntorch.load('cuda').item()", 1.0),
        (
            "open('cuda.bin', 'wb').write(bytes(8))\ntorch.from_file('cuda.bin', size=2, dtype=torch.float32).tolist()",
            [0.0, 0.0],
        ),
        ("torch.load('no_cuda_here.pt')", Raises("FileNotFoundError")),
        (
            "try:\n    torch.load('no_cuda_here.pt')\nexcept FileNotFoundError as error:\n    name = error.filename\nname",
            "no_cuda_here.pt",
        ),
        ("torch.get_device_module('cudaX')", Raises()),
        ("torch.device('cudafoo')", Raises()),
        ("torch.zeros(1, device='mycuda')", Raises()),
        ("torch.nn.ModuleDict({'my_cuda': torch.nn.Linear(1, 1)}).to('cuda')['my_cuda'].weight.is_cuda",),
        ("torch.get_device_module('cuda') is not None and {'cuda': 1}['cuda']", 1),
    ),
    *group(
        "checkpoints",
        (_SAVE % "m.pt" + "torch.load('m.pt')['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location='cpu')['w'].device.type", "cpu"),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location='cuda:0')['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location=torch.device('cuda'))['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', torch.device('cuda:0'))['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location={'cuda:0': 'cpu'})['w'].is_cuda", False),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location={'cuda:1': 'cuda:0'})['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location=lambda storage, place: storage)['w'].is_cuda", False),
        (_SAVE % "m.pt" + "torch.load('m.pt', map_location=lambda storage, place: storage.cuda(0))['w'].is_cuda",),
        (
            _SAVE % "m.pt"
            + "seen = []\ntorch.load('m.pt', map_location=lambda storage, place: seen.append(place))\nseen",
            ["cuda:0"],
        ),
        (_SAVE % "m.pt" + "torch.load('m.pt', weights_only=False)['w'].is_cuda",),
        (_SAVE % "m.pt" + "torch.load('m.pt', mmap=True, map_location='cuda')['w'].is_cuda",),
        (
            "b = io.BytesIO()\ntorch.save(torch.ones(2, device='cuda'), b)\nb.seek(0)\ntorch.load(b, map_location='cuda').is_cuda",
        ),
        (
            "torch.save(torch.ones(2, device='cuda'), 'old.pt', _use_new_zipfile_serialization=False)\ntorch.load('old.pt').is_cuda",
        ),
        (
            "from torch.serialization import load\ntorch.save(torch.ones(1), 'my_cuda.pt')\nload('my_cuda.pt', map_location='cuda').is_cuda",
        ),
        (
            "m = torch.nn.Linear(2, 2).cuda()\no = torch.optim.AdamW(m.parameters())\nm(torch.ones(1, 2).cuda()).sum().backward()\no.step()\n"
            "torch.save({'m': m.state_dict(), 'o': o.state_dict()}, 'cuda_run.pt')\nr = torch.load('cuda_run.pt', map_location='cuda')\n"
            "m.load_state_dict(r['m'])\no.load_state_dict(r['o'])\no.state[m.weight]['exp_avg'].is_cuda",
        ),
        (
            "from torch.utils.checkpoint import checkpoint\nx = torch.ones(2, device='cuda', requires_grad=True)\n"
            "checkpoint(torch.sin, x, use_reentrant=False).sum().backward()\nx.grad.is_cuda",
        ),
        (
            "from torch.utils.checkpoint import checkpoint\nx = torch.ones(2, device='cuda', requires_grad=True)\n"
            "checkpoint(torch.nn.functional.dropout, x, use_reentrant=True).sum().backward()\nx.grad.is_cuda",
        ),
        (
            "from torch.utils.checkpoint import get_device_states, set_device_states\nx = torch.ones(2, device='cuda')\n"
            "ids, states = get_device_states(x)\nset_device_states(ids, states)\nids",
            [0],
        ),
        (
            "import torch.distributed.checkpoint as dcp\ndcp.save({'w': torch.ones(2, device='cuda')}, checkpoint_id='my_cuda_dcp', no_dist=True)\n"
            "w = {'w': torch.zeros(2, device='cuda')}\ndcp.load(w, checkpoint_id='my_cuda_dcp', no_dist=True)\nw['w'].tolist()",
            [1.0, 1.0],
        ),
        ("import numpy, pickle\npickle.loads(pickle.dumps(torch.ones(2, device='cuda'))).is_cuda",),
        ("import copy\ncopy.deepcopy(torch.nn.Linear(2, 2).cuda()).weight.is_cuda",),
    ),
    *group(
        "checkpoints",
        (_WRITTEN_BY_CUDA % 0 + "torch.load('from_cuda.pt').is_cuda",),
        (_WRITTEN_BY_CUDA % 0 + "torch.load('from_cuda.pt', map_location='cuda').is_cuda",),
        (_WRITTEN_BY_CUDA % 5 + "torch.load('from_cuda.pt', map_location='cpu').tolist()", [1.0, 1.0]),
        (_WRITTEN_BY_CUDA % 5 + "torch.load('from_cuda.pt', map_location={'cuda:5': 'cuda:0'}).is_cuda",),
    ),
]
