"""Run by test_two_ranks.py on two ranks: a CUDA script that uses what gloo lacks, and prints what it got."""

import json
import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

rank = int(os.environ["RANK"])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=60))
found = {"backend": dist.get_backend(), "device": torch.cuda.current_device()}

# One group for each set of ranks, whatever options are asked for.
before = threading.active_count(), len(os.listdir("/proc/self/task"))
options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
groups = [dist.new_group([0, 1], backend="nccl", pg_options=options) for _ in range(8)]
found["distinct groups"] = len({id(group) for group in groups})
found["threads for 8 groups"] = len(os.listdir("/proc/self/task")) - before[1]
alone = [dist.new_group([r]) for r in (0, 1)]
found["own group"] = alone[rank] is not dist.GroupMember.NON_GROUP_MEMBER
found["other's group"] = alone[1 - rank] is dist.GroupMember.NON_GROUP_MEMBER
dist.destroy_process_group(groups[0])

x = torch.full((4,), float(rank + 1), device="cuda")
premultiplied = x.clone()
dist.all_reduce(premultiplied, op=dist._make_nccl_premul_sum(0.5), group=groups[1])
found["premul all_reduce"] = premultiplied.tolist()
half, source = torch.empty(2, device="cuda"), x.clone()
dist.reduce_scatter_tensor(half, source, op=dist._make_nccl_premul_sum(2.0))
found["premul reduce_scatter"], found["input kept"] = half.tolist(), torch.equal(source, x)

flat = torch.empty(2, 4, device="cuda")
dist.all_gather_into_tensor(output_tensor=flat, input_tensor=x)
found["gather"] = flat.tolist()
eights = x.to(torch.float8_e4m3fn)
gathered = torch.empty(8, dtype=torch.float8_e4m3fn, device="cuda")
dist.all_gather_into_tensor(gathered, eights)
found["float8"] = gathered.float().tolist()
average = x.clone()
dist.all_reduce(average, op=dist.ReduceOp.AVG)
found["average"] = average.tolist()

# The same gradients from one big batch, from DDP and from FSDP2.
torch.manual_seed(0)
model = torch.nn.Linear(4, 3).cuda()
batch = torch.randn(6, 4, device="cuda")
model(batch).square().mean().backward()
whole = model.weight.grad.clone()
model.zero_grad()
ddp = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
ddp(batch[rank::2]).square().mean().backward()
found["ddp gradient"] = torch.allclose(model.weight.grad, whole, atol=1e-6)
model.zero_grad()
mesh = init_device_mesh("cuda", (2,))
sharded = fully_shard(model, mesh=mesh)
sharded(batch[rank::2]).square().mean().backward()
found["fsdp2 gradient"] = torch.allclose(model.weight.grad.full_tensor(), whole, atol=1e-6)

with open(os.path.join(os.environ["FOUND"], f"{rank}.json"), "w") as file:
    json.dump(found, file)
dist.barrier(device_ids=[rank])
dist.destroy_process_group()
