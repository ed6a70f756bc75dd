"""Mixed precision, torch.compile, TorchScript and autograd: the parts of training around the device."""

# ruff: noqa: E501 - a line of a probe stays a line

from __future__ import annotations

from transfer_probes.probe import Raises, group

__all__ = ["PROBES"]

_STEP = (
    "m = torch.nn.Linear(2, 2).cuda()\no = torch.optim.SGD(m.parameters(), 0.1)\n"
    "{scaler}\nwith torch.autocast('cuda', dtype=torch.float16):\n    loss = m(torch.ones(1, 2, device='cuda')).sum()\n"
    "s.scale(loss).backward()\ns.unscale_(o)\ntorch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)\ns.step(o)\ns.update()\ns.get_scale() > 0"
)
_MM = "x = torch.ones(2, 2, device='cuda')\n"
_COMPILED = (
    "def f(x):\n    {body}\ny = torch.compile(f, backend='{backend}', fullgraph=True)(torch.ones(2, device='cuda'))\n"
)

PROBES = [
    *group(
        "mixed precision",
        (_MM + "with torch.autocast('cuda'):\n    y = x @ x\ny.dtype == torch.float16",),
        (
            _MM
            + "with torch.autocast(device_type='cuda', dtype=torch.bfloat16):\n    y = x @ x\ny.dtype == torch.bfloat16",
        ),
        (_MM + "with torch.amp.autocast('cuda', torch.bfloat16):\n    y = x @ x\ny.dtype == torch.bfloat16",),
        (_MM + "with torch.cuda.amp.autocast():\n    y = x @ x\ny.dtype == torch.float16",),
        (
            _MM
            + "with torch.cuda.amp.autocast(enabled=True, dtype=torch.bfloat16):\n    y = x @ x\ny.dtype == torch.bfloat16",
        ),
        (
            _MM
            + "from torch.cuda.amp.autocast_mode import autocast\nwith autocast():\n    y = x @ x\ny.dtype == torch.float16",
        ),
        (_MM + "f = torch.autocast('cuda')(lambda: x @ x)\nf().dtype == torch.float16",),
        (_MM + "with torch.autocast(x.device.type, dtype=torch.bfloat16):\n    y = x @ x\ny.dtype == torch.bfloat16",),
        (
            _MM
            + "with torch.autocast('cuda'):\n    with torch.autocast('cuda', enabled=False):\n        y = x @ x\ny.dtype == torch.float32",
        ),
        ("with torch.autocast('cuda'):\n    on = torch.is_autocast_enabled()\non",),
        (
            "with torch.autocast('cuda', dtype=torch.bfloat16):\n    d = torch.get_autocast_gpu_dtype()\nd == torch.bfloat16",
        ),
        (
            "with torch.autocast('cuda', dtype=torch.bfloat16):\n    d = torch.get_autocast_dtype('cuda')\nd == torch.bfloat16",
        ),
        ("torch.get_autocast_dtype('cuda') == torch.float16",),
        ("torch.set_autocast_enabled('cuda', True)\ntorch.is_autocast_enabled('cuda')",),
        ("torch.set_autocast_gpu_dtype(torch.bfloat16)\ntorch.get_autocast_gpu_dtype() == torch.bfloat16",),
        (_STEP.format(scaler="s = torch.amp.GradScaler('cuda')"),),
        (_STEP.format(scaler="s = torch.cuda.amp.GradScaler()"),),
        (_STEP.format(scaler="s = torch.amp.GradScaler()"),),
        (_STEP.format(scaler="from torch.cuda.amp.grad_scaler import GradScaler\ns = GradScaler(init_scale=2.0)"),),
        ("torch.amp.GradScaler('cuda', enabled=True).is_enabled()",),
        ("isinstance(torch.cuda.amp.GradScaler(), torch.amp.GradScaler)",),
        ("issubclass(torch.cuda.amp.autocast, torch.autocast)",),
        (
            "class F(torch.autograd.Function):\n    @staticmethod\n    @torch.amp.custom_fwd(device_type='cuda', cast_inputs=torch.float32)\n"
            "    def forward(ctx, x):\n        return x\n    @staticmethod\n    @torch.amp.custom_bwd(device_type='cuda')\n"
            "    def backward(ctx, g):\n        return g\n"
            "with torch.autocast('cuda'):\n    y = F.apply(torch.ones(1, device='cuda', dtype=torch.float16))\ny.dtype == torch.float32",
        ),
        (
            "class F(torch.autograd.Function):\n    @staticmethod\n    @torch.cuda.amp.custom_fwd(cast_inputs=torch.float32)\n"
            "    def forward(ctx, x):\n        return x\n    @staticmethod\n    @torch.cuda.amp.custom_bwd\n"
            "    def backward(ctx, g):\n        return g\n"
            "with torch.autocast('cuda'):\n    y = F.apply(torch.ones(1, device='cuda', dtype=torch.float16))\ny.dtype == torch.float32",
        ),
        ("torch.amp.is_autocast_available('cuda')",),
        ("torch.cuda.amp.common.amp_definitely_not_available()", False),
    ),
    *group(
        "torch.compile and TorchScript",
        (_COMPILED.format(body="return x.sin()", backend="eager") + "y.is_cuda",),
        (_COMPILED.format(body="return x.sin() + 1", backend="aot_eager") + "y.is_cuda",),
        (_COMPILED.format(body="return x + torch.ones(2, device='cuda')", backend="eager") + "y.tolist()", [2.0, 2.0]),
        (
            _COMPILED.format(body="return x + torch.ones(2, device='cuda')", backend="aot_eager") + "y.tolist()",
            [2.0, 2.0],
        ),
        (_COMPILED.format(body="return x + torch.ones(2).to('cuda')", backend="eager") + "y.tolist()", [2.0, 2.0]),
        (_COMPILED.format(body="return x + torch.ones(2).cuda()", backend="eager") + "y.tolist()", [2.0, 2.0]),
        (
            _COMPILED.format(body="return x + torch.ones(2, device=x.device)", backend="aot_eager") + "y.tolist()",
            [2.0, 2.0],
        ),
        (_COMPILED.format(body="return x * (2 if x.is_cuda else 3)", backend="eager") + "y.tolist()", [2.0, 2.0]),
        (
            _COMPILED.format(body="return x * (2 if torch.cuda.is_available() else 3)", backend="eager") + "y.tolist()",
            [2.0, 2.0],
        ),
        (
            _COMPILED.format(body="return x * (2 if x.device == torch.device('cuda:0') else 3)", backend="eager")
            + "y.tolist()",
            [2.0, 2.0],
        ),
        (_COMPILED.format(body="return x.new_ones(2, device='cuda') + x", backend="eager") + "y.tolist()", [2.0, 2.0]),
        (
            "def f(x):\n    with torch.autocast('cuda', dtype=torch.bfloat16):\n        return x @ x\n"
            "torch.compile(f, backend='eager', fullgraph=True)(torch.ones(2, 2, device='cuda')).dtype == torch.bfloat16",
        ),
        (
            "m = torch.compile(torch.nn.Linear(2, 2).cuda(), backend='aot_eager')\nm(torch.ones(1, 2, device='cuda')).sum().backward()\n"
            "m.weight.grad.is_cuda",
        ),
        (
            "def f(x):\n    s = torch.cuda.Stream()\n    with torch.cuda.stream(s):\n        y = x + 1\n    torch.cuda.current_stream().wait_stream(s)\n"
            "    return y\ntorch.compile(f, backend='eager')(torch.ones(2, device='cuda')).tolist()",
            [2.0, 2.0],
        ),
        (
            "@torch.jit.script\ndef f(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\nisinstance(f, torch.jit.ScriptFunction)",
        ),
        (
            "@torch.jit.script\ndef f(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\nf(torch.ones(1, device='cuda')).item()",
            2.0,
        ),
        (
            "m = torch.jit.script(torch.nn.Linear(2, 2).cuda())\nm.save('cuda_script.pt')\ntorch.jit.load('cuda_script.pt', map_location='cuda').weight.is_cuda",
        ),
        (
            "class M(torch.jit.ScriptModule):\n    @torch.jit.script_method\n    def forward(self, x):\n        return x + 1\n"
            "M()(torch.ones(1, device='cuda')).item()",
            2.0,
        ),
        (
            "def f(x: torch.Tensor, device: torch.device) -> torch.Tensor:\n    return torch.zeros(2, device=device) + x\n"
            "torch.jit.script(f)(torch.ones(2, device='cuda'), torch.device('cuda')).is_cuda",
        ),
        (
            "torch.jit.trace(torch.nn.Linear(2, 2).cuda(), torch.ones(1, 2, device='cuda'))(torch.ones(1, 2).cuda()).is_cuda",
        ),
        ("torch.fx.symbolic_trace(torch.nn.Linear(2, 2).cuda())(torch.ones(1, 2).cuda()).is_cuda",),
        (
            "torch.export.export(torch.nn.Linear(2, 2).cuda(), (torch.ones(1, 2).cuda(),)).module()(torch.ones(1, 2).cuda()).is_cuda",
        ),
        (
            "from torch.func import grad\ngrad(lambda x: (x * torch.ones(2, device='cuda')).sum())(torch.ones(2, device='cuda')).tolist()",
            [1.0, 1.0],
        ),
        (
            "from torch._subclasses.fake_tensor import FakeTensorMode\nwith FakeTensorMode():\n    x = torch.ones(2, device='cuda')\nx.is_cuda",
        ),
        (
            "@torch.library.custom_op('probe::twice', mutates_args=(), device_types='cuda')\ndef twice(x: torch.Tensor) -> torch.Tensor:\n"
            "    return x * 2\ntwice(torch.ones(1, device='cuda')).item()",
            2.0,
        ),
        ("torch._inductor.utils.get_gpu_type() in ('cuda', 'npu')", True),
    ),
    *group(
        "modules, backends and autograd",
        ("torch.backends.cuda.matmul.allow_tf32 = True\ntorch.backends.cuda.matmul.allow_tf32",),
        (
            "torch.backends.cudnn.benchmark = True\ntorch.backends.cudnn.deterministic = True\ntorch.backends.cudnn.benchmark",
        ),
        ("torch.set_float32_matmul_precision('high')\ntorch.get_float32_matmul_precision()", "high"),
        ("torch.backends.cuda.preferred_linalg_library('cusolver')\nTrue",),
        ("torch.backends.cuda.preferred_blas_library('cublaslt')\nTrue",),
        ("torch.backends.cuda.enable_flash_sdp(True)\ntorch.backends.cuda.flash_sdp_enabled()",),
        ("torch.backends.cuda.cufft_plan_cache[0].max_size = 8\ntorch.backends.cuda.cufft_plan_cache[0].max_size", 8),
        (
            "from torch.nn.attention import SDPBackend, sdpa_kernel\nq = torch.ones(1, 1, 16, 16, device='cuda', dtype=torch.float16)\n"
            "with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):\n    y = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
            "y.float().mean().item()",
            1.0,
        ),
        ("torch.use_deterministic_algorithms(True)\ntorch.are_deterministic_algorithms_enabled()",),
        (
            "m = torch.nn.DataParallel(torch.nn.Linear(2, 2).cuda(), device_ids=[0])\nm(torch.ones(1, 2).cuda()).is_cuda",
        ),
        (
            "m = torch.nn.Linear(2, 2).cuda()\no = torch.optim.AdamW(m.parameters(), fused=True)\nm(torch.ones(1, 2).cuda()).sum().backward()\no.step()\nTrue",
        ),
        (
            "m = torch.nn.Linear(2, 2).cuda()\no = torch.optim.AdamW(m.parameters(), capturable=True)\nm(torch.ones(1, 2).cuda()).sum().backward()\n"
            "o.step()\no.state[m.weight]['step'].is_cuda",
        ),
        (
            "m = torch.nn.Linear(2, 2).cuda()\no = torch.optim.AdamW(m.parameters(), foreach=True)\nm(torch.ones(1, 2).cuda()).sum().backward()\no.step()\nTrue",
        ),
        (
            "torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 8, device='cuda', dtype=torch.float16)] * 3).is_cuda",
        ),
        ("x = torch.ones(2, device='cuda')\nx + torch.ones(2)", Raises()),
        ("torch.ones(2, device='cuda').numpy()", Raises("TypeError")),
        ("torch.ones(2, device='cuda').tolist()", [1.0, 1.0]),
        ("torch.ones(2, dtype=torch.float64, device='cuda').dtype == torch.float64",),
    ),
]
