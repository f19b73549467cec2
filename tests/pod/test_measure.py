"""The pod check: what it reads in a compiled program, and what it makes of it."""

import tensorflow as tf

from lars_keras.pod.chips import CHIPS
from lars_keras.pod.measure import Collective, Program, collectives, hbm_bytes
from lars_keras.pod.roofline import largest_microbatch, line_through, roofline

GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
# Lines as the compiler writes them, shortened.
HLO = f"""
%all-reduce-scatter (input: f32[4096,4096]) -> f32[280,4096] {{
  %all-reduce.1 = f32[4480,4096]{{1,0:T(8,128)}} all-reduce(%pad), channel_id=2, {GROUPS}, to_apply=%add
}}
%async_collective_fusion.1 (param: bf16[16,4096]) -> bf16[64,4096] {{
  %all-gather.1 = bf16[64,4096]{{1,0}} all-gather(%param), channel_id=1, {GROUPS}, attributes={{chain_id="0"}}
}}
%async_collective_fusion.2 (param: bf16[16,4096]) -> bf16[64,4096] {{
  %all-gather.2 = bf16[64,4096]{{1,0}} all-gather(%param), channel_id=1, {GROUPS}, attributes={{chain_id="0"}}
}}
ENTRY %main (param: f32[96]) -> f32[96] {{
  %all-reduce.9 = (f32[96]{{0}}, /*index=1*/bf16[8,4]{{1,0}}) all-reduce(%a), channel_id=3, replica_groups=[1,8]<=[8]
  %reduce-scatter.1 = f32[16,4096]{{1,0}} reduce-scatter(%g), channel_id=4, {GROUPS}, dimensions={{0}}
  %all-gather-start.1 = (f32[2,8]{{1,0}}, f32[8,8]{{1,0}}) all-gather-start(%c), channel_id=5, {GROUPS}
  %all-gather-done.1 = f32[8,8]{{1,0}} all-gather-done(%all-gather-start.1)
  %alone = f32[5]{{0}} all-reduce(%d), channel_id=6, replica_groups={{{{0}}}}
}}
"""


class MeasureTest(tf.test.TestCase):
    def test_collectives(self):
        self.assertEqual(
            collectives(HLO),
            [
                Collective("reduce-scatter", 4480 * 4096 * 4, 4, ["f32"]),
                Collective("all-gather", 64 * 4096 * 2, 4, ["bf16"]),
                Collective("all-reduce", 96 * 4 + 8 * 4 * 2, 8, ["bf16", "f32"]),
                Collective("reduce-scatter", 64 * 4096 * 4, 4, ["f32"]),
                Collective("all-gather", 8 * 8 * 4, 4, ["f32"]),
            ],
        )

    def test_forms_of_the_text(self):
        """Several tensors in one operation, counters beside them, groups of all chips, and dtypes of one byte."""
        hlo = f"""HloModule jit_update, is_scheduled=true, replica_count=1, num_partitions=8
ENTRY %main (param: f32[96]) -> f32[96] {{
  %all-gather-start.1 = ((f32[2,8], bf16[3]), (f32[8,8], bf16[12])) all-gather-start(%a, %b), {GROUPS}
  %reduce-scatter-start.1 = ((f32[8], f32[16]), (f32[2], f32[4])) reduce-scatter-start(%c, %d), {GROUPS}
  %permute.1 = (f32[7], f32[7], u32[], u32[]) collective-permute-start(%e), source_target_pairs={{{{0,1}}}}
  %permute.2 = f32[9] collective-permute(%e), source_target_pairs={{{{0,1}}}}
  %all-reduce.1 = f32[5] all-reduce(%f), replica_groups={{}}, to_apply=%add
  %all-gather.1 = f8e4m3fn[64] all-gather(%g), {GROUPS}
  %permute.3 = (s32[], s32[]) collective-permute-start(%e), source_target_pairs={{{{0,1}}}}
  %gather.2 = ((bf16[8]), bf16[32], u32[]) all-gather-start(%g), {GROUPS}
  %all-gather.6 = f32[8,784]{{1,0}} all-gather(%h), replica_groups=mesh['axis_0'=8] {{'axis_0'}}, dimensions={{0}}
  %all-gather.7 = f32[16] all-gather(%h), replica_groups=mesh['axis_0'=4,'axis_1'=4] {{'axis_1','axis_0'}}
  %all-gather.8 = f32[16] all-gather(%h), replica_groups=mesh['a'=4,'b'=4] {{'a':(1)2,'b'}}
}}
"""
        self.assertEqual(
            collectives(hlo),
            [
                Collective("all-gather", 8 * 8 * 4 + 12 * 2, 4, ["bf16", "f32"]),
                Collective("reduce-scatter", (8 + 16) * 4, 4, ["f32"]),
                Collective("collective-permute", 7 * 4, 2, ["f32"]),
                Collective("collective-permute", 9 * 4, 2, ["f32"]),
                Collective("all-reduce", 5 * 4, 8, ["f32"]),
                Collective("all-gather", 64, 4, ["f8e4m3fn"]),
                Collective("collective-permute", 4, 2, ["s32"]),
                Collective("all-gather", 64, 4, ["bf16"]),
                Collective("all-gather", 8 * 784 * 4, 8, ["f32"]),
                Collective("all-gather", 64, 16, ["f32"]),
                Collective("all-gather", 64, 8, ["f32"]),
            ],
        )
        with self.assertRaisesRegex(ValueError, "form that is not known. Received: %a = .*replica_groups=other"):
            collectives("HloModule x\n  %a = f32[5] all-reduce(%f), replica_groups=other, to_apply=%add")

    def test_bytes_on_the_links(self):
        self.assertEqual(Collective("collective-permute", 800, 2, ["f32"]).sent, 800)
        self.assertEqual(Collective("all-reduce", 800, 4, ["f32"]).sent, 1200)
        self.assertEqual(Collective("all-gather", 800, 4, ["f32"]).sent, 600)
        self.assertEqual(Collective("reduce-scatter", 800, 8, ["f32"]).sent, 700)

    def test_bytes_moved(self):
        hlo = """
%fused (p: f32[8]) -> f32[8] {
  ROOT %inside = f32[8000]{0} add(%p, %p)
}

ENTRY %main (a: f32[100], b: bf16[10]) -> f32[100] {
  %a = f32[100]{0:T(128)} parameter(0)
  %b = bf16[10]{0} parameter(1)
  %slice-start.1 = ((f32[100]{0:T(128)}), f32[50]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:50]}
  %slice-done.1 = f32[50]{0:T(128)S(1)} slice-done(%slice-start.1)
  %copy-start.1 = (f32[100]{0}, f32[100]{0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = f32[100]{0} copy-done(%copy-start.1)
  %fusion.1 = (f32[100]{0}, bf16[10]{0:S(1)}) fusion(%slice-done.1, %copy-done.1, %b), kind=kLoop, calls=%fused
  %again = f32[5]{0} conditional(%near, %copy-done.1, %b), true_computation=%fused, false_computation=%fused
  ROOT %x = f32[100]{0} get-tuple-element(%fusion.1), index=0
}
"""
        self.assertEqual(hbm_bytes(hlo), 50 * 4 + 2 * 100 * 4 + (100 * 4 + 100 * 4 + 10 * 2) + 5 * 4)

    def test_memory(self):
        self.assertEqual(Program("update", 1, 100, 90, 80, 50, 5, 0.0, 0.0, 0.0, []).memory, 165)
        self.assertEqual(Program("accumulate", 4, 100, 90, 80, 50, 5, 0.0, 0.0, 0.0, [], resident=7).memory, 172)


class RooflineTest(tf.test.TestCase):
    def test_bounds(self):
        chip = CHIPS["v5e"]
        gather = Collective("all-gather", 200_000_000, 2, ["f32"])
        programs = [
            Program("accumulate", 4, 0, 0, 0, 0, 0, 197e9, 819e6, 5e9, []),
            Program("finish", 1, 0, 0, 0, 0, 0, 0.0, 2 * 819e6, 5e9, [gather]),
        ]
        found = roofline(programs, chip, 1, 1000)
        self.assertAllClose(found.seconds, {"compute": 4e-3, "memory": 6e-3, "interconnect": 0.5e-3})
        self.assertEqual(found.bound, "memory")
        self.assertAllClose(
            [found.seconds_per_update, found.images_per_second, found.compute_utilization], [6e-3, 1000 / 6e-3, 2 / 3]
        )
        self.assertAllClose(roofline(programs, chip, 2, 1000).seconds_per_update, 12e-3)

    def test_largest_microbatch(self):
        line = line_through((64, 400.0), (128, 600.0))
        self.assertAllClose(line, (200.0, 3.125))
        self.assertEqual(largest_microbatch(line, 1000.0, 512), 256)
        self.assertEqual(largest_microbatch(line, 999.9, 512), 128)
        self.assertIsNone(largest_microbatch(line, 200.0, 512))
        self.assertEqual(largest_microbatch(line, 1e9, 96), 96)


if __name__ == "__main__":
    tf.test.main()
