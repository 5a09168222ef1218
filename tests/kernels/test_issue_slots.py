"""The count of issue slots: basic blocks, loops and ways of small listings, and the samples of each cell."""

import torch

from tools.issue_slots import samples_of_cells
from tools.sass import Code

LISTING = """
.text.some_kernel:
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R6] ;
        /*00a0*/              @!P1 BRA `(.L_x_3) ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R1 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4) ;
"""


def test_loops_count_as_often_as_they_are_said_to_run():
    code = Code(LISTING)
    outer, wait = code.loops.inner
    (inner,) = outer.inner
    assert wait.waits
    assert not inner.waits
    assert (inner.has("MUFU"), outer.has("MUFU", "LDG")) == (1, 2)
    trips = {outer: 5.0, inner: 3.0}
    around = 4  # MOV, EXIT, STG, EXIT; loops that wait and the padding are left out
    assert code.count(lambda _: 0.0) == around
    assert code.count(trips.__getitem__) == around + 5 * (4 + 3 * 3)
    assert code.count(trips.__getitem__, prefix="MUFU") == 15
    assert code.count(lambda _: 0.0, outer) == 4


def test_the_shortest_way_leaves_a_branch_out():
    branch = LISTING.replace("@P2 BRA `(.L_x_1)", "@P2 NOP")
    (outer, _) = Code(branch).loops.inner
    assert not outer.inner
    assert Code(branch).count(lambda _: 0.0, outer) == 7
    assert Code(branch).count(lambda _: 0.0, outer, longest=False) == 4


def test_a_call_is_the_slow_path_that_nobody_takes():
    called = LISTING.replace("FADD R1, R1, R2", "CALL.REL.NOINC `(some_division)")
    code = Code(called)
    assert not any(loop.has("MUFU") for loop in code.loops.inner)


def test_samples_of_cells_at_a_scale_of_eight():
    """Sample i reads the middle two cells of each eight."""
    rows, columns = samples_of_cells(torch.tensor([[0.0, 192.0, 192.0, 384.0]]), 24, (384, 384))
    assert rows[0].sum() == columns[0].sum() == 48
    assert rows[0, :16].tolist() == [0, 0, 0, 1, 1, 0, 0, 0] * 2
    assert not columns[0, :192].any()
