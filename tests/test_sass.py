"""Tests the reader of machine code on listings written by hand and on one that ptxas makes."""

import subprocess

import pytest

from benchmarks.sass import INSTRUCTION_BYTES, Instruction, disassemble, find_loops, parse, uneven_sums

# The listing has two loops, the outer one from 0x10 to 0xd0 and the inner one from 0x30 to 0x50. The outer one holds a
# spin loop that does no work (0x80). A block behind the end jumps back into the outer loop and is a part of it. The
# branch to itself at 0x110 ends every kernel.
NESTED = """
	.headerflags	@"EF_CUDA_SM90"
.text.kernel:
	//## File "/some/where/kernel.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
.L_x_2:
	//## File "/some/where/scores.py", line 9 inlined at "/some/where/kernel.py", line 8
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   FFMA R2, R3, UR4, -R2.reuse ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/                   BRA.U UP1, `(.L_x_5) ;
.L_x_6:
        /*0070*/                   LDS R5, [R1] ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R2 ;
        /*0090*/              @!P1 BRA `(.L_x_3) ;
        /*00a0*/              @!PT LDS RZ, [RZ] ;
        /*00b0*/                   IADD3 R6, R6, 0x1, RZ ;
        /*00c0*/                   ISETP.LT.AND P0, PT, R6, R7, PT ;
        /*00d0*/               @P0 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0100*/                   BRA `(.L_x_6) ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
        /*0120*/                   NOP;
"""


def one(opcode: str, operands: str = "R0, R1, R2", predicate: str = "") -> Instruction:
    return Instruction(0, predicate, opcode, operands, None, "")


def opcodes(code: list[Instruction]) -> str:
    return " ".join(instruction.opcode.partition(".")[0] for instruction in code)


def test_parse():
    code = parse(NESTED)
    assert [instruction.address for instruction in code] == list(range(0, 0x130, INSTRUCTION_BYTES))
    assert code[0] == Instruction(0, "", "LDC", "R1, c[0x0][0x28]", None, "kernel.py:7")
    assert code[5] == Instruction(0x50, "@!P0", "BRA", "`(.L_x_2)", 0x30, "scores.py:9")
    assert code[10].runs is False and code[9].runs is True


def test_a_listing_that_lacks_an_instruction_is_refused():
    with pytest.raises(ValueError, match="missing before this one: /\\*0050"):
        parse(NESTED.replace("/*0040*/", "/*unreadable*/"))
    with pytest.raises(ValueError, match="no instructions"):
        parse("nvdisasm fatal: not an ELF file")


def test_loops_leave_out_what_works_inside_them():
    code = parse(NESTED)
    outside, outer, inner = find_loops(code, lambda body: any(x.kind == "tensor" for x in body))
    assert opcodes(outside) == "LDC EXIT BRA NOP"
    assert opcodes(outer) == "HMMA MUFU BRA LDS SYNCS BRA LDS IADD3 ISETP BRA STG BRA"
    assert opcodes(inner) == "HMMA FFMA BRA"


def test_a_block_that_jumps_back_is_no_loop():
    code = parse(
        """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   BRA `(.L_x_2) ;
        """
    )
    assert [opcodes(part) for part in find_loops(code, bool)] == ["BRA HMMA EXIT FADD BRA"]


@pytest.mark.parametrize(
    "opcode, kind",
    [
        ("HGMMA.64x64x16.F32.BF16", "tensor"),
        ("HMMA.16816.F32.BF16", "tensor"),
        ("UTCHMMA", "tensor"),
        ("MUFU.EX2", "MUFU"),
        ("I2F.RP", "MUFU"),
        ("FMUL", "FFMA"),
        ("FMNMX", "compare"),
        ("I2FP.F32.S32", "compare"),
        ("IMAD.WIDE", "IMAD"),
        ("HFMA2.MMA", "IMAD"),
        ("SHFL.BFLY", "shuffle"),
        ("LDSM.16.M88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("STL.64", "local"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("LDGDEPBAR", "control"),
        ("UIADD3.64", "uniform"),
        ("R2UR", "uniform"),
        ("LEA.HI.X", "integer"),
        ("SEL", "integer"),
    ],
)
def test_kind(opcode, kind):
    assert one(opcode).kind == kind
    assert one(opcode, predicate="@!PT").kind == "control"


@pytest.mark.parametrize(
    "opcode, operands, flops, shared, loaded",
    [
        # a quarter of a warpgroup's 64 x 64 products of length 16; B, and A if not in registers, are in shared memory
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24", 2 * 64 * 64 * 16 // 4, (64 + 64) * 16 * 2 // 4, 0),
        ("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR4], R24, gsb0", 2 * 64 * 128 * 16 // 4, 128 * 16 * 2 // 4, 0),
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", 2 * 16 * 8 * 16, 0, 0),
        ("HMMA.1688.F32.TF32", "R4, R8, R12, R4", 2 * 16 * 8 * 8, 0, 0),
        ("UTCHMMA", "gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6], idesc[UR7]", 0, 0, 0),
        ("LDS.128", "R4, [R1]", 0, 512, 0),
        ("LDS", "R4, [R1]", 0, 128, 0),
        ("LDSM.16.M88.4", "R4, [R1]", 0, 512, 0),
        ("LDSM.16.MT88.2", "R4, [R1]", 0, 256, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128", "[R2], desc[UR4][R4.64], P0", 0, 512, 512),
        ("LDG.E.U8", "R4, desc[UR4][R4.64]", 0, 0, 32),
        ("LDG.E.128.CONSTANT", "R4, desc[UR4][R4.64]", 0, 0, 512),
        ("STG.E.128", "desc[UR4][R4.64], R8", 0, 0, 0),
    ],
)
def test_work_of_an_instruction(opcode, operands, flops, shared, loaded):
    instruction = one(opcode, operands)
    assert (instruction.flops, instruction.shared_bytes, instruction.loaded_bytes) == (flops, shared, loaded)


def test_padding_moves_nothing():
    assert one("LDS", "RZ, [RZ]", predicate="@!PT").shared_bytes == 0


def test_what_ptxas_makes_of_a_loop(tmp_path):
    from triton import knobs

    source, cubin = tmp_path / "loop.ptx", tmp_path / "loop.cubin"
    source.write_text(
        """
        .version 8.0
        .target sm_90
        .address_size 64
        .visible .entry kernel(.param .u64 to, .param .u32 turns) {
            .reg .pred %p; .reg .b32 %i, %n; .reg .f32 %x, %y; .reg .b64 %to;
            ld.param.u64 %to, [to];
            ld.param.u32 %n, [turns];
            mov.f32 %x, 0f3F800000;
            mov.u32 %i, 0;
        again:
            .pragma "nounroll";
            ex2.approx.ftz.f32 %x, %x;
            bar.sync 0;
            add.u32 %i, %i, 1;
            setp.lt.u32 %p, %i, %n;
            @%p bra again;
            st.global.f32 [%to], %x;
            ret;
        }
        """
    )
    ptxas = [knobs.nvidia.ptxas.path, "-arch=sm_90", "-o", str(cubin), str(source)]
    subprocess.run(ptxas, check=True)
    outside, loop = find_loops(disassemble(cubin.read_bytes()), lambda body: any(x.kind == "MUFU" for x in body))
    assert sum(x.opcode == "MUFU.EX2" for x in loop) == sum(x.opcode.startswith("BAR.SYNC") for x in loop) == 1
    assert not any(x.kind == "MUFU" for x in outside)
    assert sum(x.opcode.startswith("STG.E") for x in outside) == 1


@pytest.mark.parametrize(
    "sums, is_uneven",
    [
        (["FFMA R4, R2, R7, R5"], True),
        (["FFMA R4, R2, R7, -R5.reuse"], True),
        (["FMUL R4, R2, R7", "FFMA R8, R4, R7, R5"], True),
        (["FADD R4, R2, R5", "FFMA R8, R4, R7, R5"], False),  # the first reader is a plain addition
        (["FFMA R4, R2, R5, R7"], False),  # a factor is the same in both threads
        (["FADD2 R4, R2, R5", "FFMA R8, R4, R7, R6"], False),
        (["MOV R5, R9", "FFMA R4, R2, R7, R5"], False),  # overwritten
    ],
)
def test_uneven_sums(sums, is_uneven):
    code = [one("SHFL.BFLY", "PT, R5, R2, 0x1, 0x1f"), *(one(*text.split(" ", 1)) for text in sums)]
    assert bool(uneven_sums(code)) is is_uneven
    code[0] = one("SHFL.IDX", "PT, R5, R2, 0x1, 0x1f")  # moves values, of which each thread has its own
    assert uneven_sums(code) == []
