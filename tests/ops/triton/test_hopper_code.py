"""Matrix descriptors are recognised in machine code, right ones and those that ptxas miscompiles."""

import pytest

from tests.ops.triton.hopper_code import strange_descriptors

PRODUCT = "HGMMA.64x16x16.F32 R88, R36, gdesc[UR4].tnspB, R88, gsb0"
# Output of ptxas, where the lower half is UR46: UR12 and UR5 are a pointer and the number of a warp.
WRONG = [
    "ULDC.64 UR12, c[0x0][0x610]",
    "R2UR UR5, R2",
    "UIADD3 UR12, UP1, UR12, 0x20, URZ",
    "UIADD3.X UR7, UR5, -0x3ffffff0, URZ, UP1, !UPT",
    "UMOV UR6, UR12",
]
SWAP = [
    "ULOP3.LUT UR7, UR7, UR6, URZ, 0x3c, !UPT",
    "ULOP3.LUT UR6, UR7, UR6, URZ, 0x3c, !UPT",
    "ULOP3.LUT UR7, UR7, UR6, URZ, 0x3c, !UPT",
]


def listing(*lines):
    return "\n".join(
        line if line.startswith(".") else f"        /*{16 * number:04x}*/  {line} ;"
        for number, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["UMOV UR7, 0xc0000010"],
        ["UMOV UR5, URZ", "UIADD3.X UR7, UR5, -0x3ffffff0, URZ, UP1, !UPT"],
        ["CS2R R8, SRZ", "IADD3.X R9, R9, 0x40000040, RZ, P1, !PT", "R2UR UR7, R9"],
        ["UMOV UR9, 0x40000040", "UIADD3.64 UR6, UR8, 0x2, URZ"],
        [
            "UMOV UR8, 0xfffffffe",
            "UMOV UR9, 0x7fffffdf",
            "UMOV UR7, URZ",
            "UIADD3.64 UR6, UR6, -UR8, URZ",
        ],
        ["MOV R3, 0x80000020", "STL.64 [R1+0x8], R2", "LDL R9, [R1+0xc]", "R2UR UR7, R9"],
        # Two registers are swapped.
        ["UMOV UR6, 0x80000020", "R2UR UR7, R3", *SWAP],
    ],
)
def test_constant_upper_halves(lines):
    assert strange_descriptors(listing(*lines, PRODUCT, "EXIT")) == []


def test_upper_halves_of_something_else():
    assert strange_descriptors(listing(*WRONG, PRODUCT, "EXIT")) == [
        "0050: HGMMA.64x16x16.F32, UR7"
    ]


def test_first_matrices_are_in_shared_memory_or_registers():
    shared = "HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT"
    assert strange_descriptors(listing("UMOV UR7, 0x40000040", shared)) == [
        "0010: HGMMA.64x64x16.F32, UR5"
    ]


def test_values_changed_in_a_loop_are_unknown():
    lines = ["UMOV UR7, 0x40000040", ".L_x_0:", PRODUCT, "ULDC UR7, c[0x0][0x610]"]
    assert len(strange_descriptors(listing(*lines, "@P0 BRA `(.L_x_0)", "EXIT"))) == 1
    lines[-1] = "@P1 UMOV UR7, 0x40000040"
    assert not strange_descriptors(listing(*lines, "@P0 BRA `(.L_x_0)", "EXIT"))
