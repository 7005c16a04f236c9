"""Rows and devices: what becomes of mesh, micro-batches and rows on a number of devices that nobody had in mind."""

import dataclasses
import math
import types

import pytest
from tiny_runs import tiny_trainer

from lcx.errors import UserError
from lcx.sharding import MeshShape
from lcx.training import division

# devices, rows, tokens, mesh -> what the mesh becomes; None: as it is
DIVIDED = [
    (1, 64, 1024, {}, None),
    (16, 64, 1024, {}, None),
    (6, 64, 1024, {}, None),  # 66 rows with padding, which 2 devices with a third of a row each could not avoid
    (256, 64, 1024, {}, {"fsdp": 64, "context": 4}),
    (48, 64, 1024, {}, {"fsdp": 24, "context": 2}),  # 72 rows instead of 96
    (64, 16, 1024, {"data": -1, "fsdp": 1}, {"data": 16, "context": 4}),
    (64, 16, 1024, {"data": 2, "context": 2}, {"fsdp": 8, "context": 4}),
    (6, 1, 1024, {}, {"fsdp": 3, "context": 2}),  # two of three have nothing but padding
    (6, 1, 999, {}, {"fsdp": 2, "context": 3}),
    (64, 16, 1024, {"fsdp": 64}, None),  # what was asked for is refused by `check`, and not changed
    (7, 16, 1024, {"tensor": 2}, None),  # refused when it is built
]


@pytest.mark.parametrize("devices, rows, tokens, asked, becomes", DIVIDED)
def test_devices_beyond_the_rows_share_them(devices, rows, tokens, asked, becomes, tmp_path):
    shape = MeshShape(**asked)
    trainer = tiny_trainer(tmp_path, batch_size=rows, seq_len=tokens, mesh=shape)
    assert division._shape(trainer, devices) == dataclasses.replace(shape, **(becomes or {}))


def test_what_is_said_of_rows_and_devices(tmp_path):
    def mesh(**sizes):
        sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
        return types.SimpleNamespace(shape=sizes, size=math.prod(sizes.values()))

    trainer = tiny_trainer(tmp_path, batch_size=64, accumulation=8)
    assert division.remarks(trainer, mesh(fsdp=8)) == division.remarks(trainer, mesh()) == []
    assert division.micro_batches(trainer, mesh(data=2, fsdp=8)) == 4
    (fewer,) = division.remarks(trainer, mesh(fsdp=16))
    assert fewer.startswith("4 micro-batches instead of 8")
    shared, fewer = division.remarks(trainer, mesh(fsdp=64, context=4))
    assert shared == "64 rows on 256 devices: 4 devices share each row (context)" and "1 micro-batch in" in fewer
    more, padded = division.remarks(trainer, mesh(fsdp=6))
    assert more.startswith("11 micro-batches instead of 8") and "every batch gets 2 rows of padding" in padded
    with pytest.raises(UserError, match=r"8 rows \(Trainer.batch_size\) for data x fsdp = 16 devices; raise"):
        division.check(tiny_trainer(tmp_path, mesh=MeshShape(fsdp=16)), mesh(fsdp=16))
    with pytest.raises(UserError, match="seq_len 32 does not divide over context = 5 devices"):
        division.check(tiny_trainer(tmp_path), mesh(context=5))
