"""The pod check: what it reads in a compiled program, what it makes of it, a small model compiled for a real chip."""

import contextlib
import importlib.util
import io
import json
import pathlib
import tempfile
import unittest.mock

import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.pod import __main__ as pod_check
from lars_keras.pod import scaling
from lars_keras.pod.chips import CHIPS
from lars_keras.pod.measure import Collective, Program, collectives, hbm_bytes
from lars_keras.pod.roofline import largest_microbatch, line_through, roofline
from lars_keras.runtime.errors import UsageError

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

    def test_bytes_on_the_links(self):
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
  ROOT %x = f32[100]{0} get-tuple-element(%fusion.1), index=0
}
"""
        self.assertEqual(hbm_bytes(hlo), 50 * 4 + 2 * 100 * 4 + (100 * 4 + 100 * 4 + 10 * 2))

    def test_memory(self):
        self.assertEqual(Program("update", 1, 100, 90, 80, 50, 5, 0.0, 0.0, 0.0, []).memory, 165)
        self.assertEqual(Program("pass", 4, 100, 90, 80, 50, 5, 0.0, 0.0, 0.0, [], beside=7).memory, 172)


class RooflineTest(tf.test.TestCase):
    def test_bounds(self):
        chip = CHIPS["v5e"]
        gather = Collective("all-gather", 200_000_000, 2, ["f32"])
        programs = [
            Program("pass", 4, 0, 0, 0, 0, 0, 197e9, 819e6, 5e9, []),
            Program("finish", 1, 0, 0, 0, 0, 0, 0.0, 2 * 819e6, 5e9, [gather]),
        ]
        found = roofline(programs, chip, 1, 1000, 600)
        self.assertAllClose(found["seconds"], {"compute": 4e-3, "memory": 6e-3, "interconnect": 0.5e-3})
        self.assertEqual(found["bound"], "memory")
        self.assertAllClose(
            [found["images_per_second"], found["hours"], found["share_of_peak_compute"]], [1000 / 6e-3, 1e-3, 2 / 3]
        )
        two_cores = roofline(programs, chip, 2, 1000, 600)
        self.assertAllClose(two_cores["seconds_per_update"], 12e-3)

    def test_largest_microbatch(self):
        line = line_through((64, 400.0), (128, 600.0))
        self.assertAllClose(line, (200.0, 3.125))
        self.assertEqual(largest_microbatch(line, 1000.0, 512), 256)
        self.assertEqual(largest_microbatch(line, 999.9, 512), 128)
        self.assertIsNone(largest_microbatch(line, 200.0, 512))
        self.assertEqual(largest_microbatch(line, 1e9, 96), 96)


class ScalingTest(tf.test.TestCase):
    def test_table_and_plot(self):
        def point(chips, seconds):
            programs = [Program("update", 1, 0, 0, 0, 0, 0, 1e12, seconds * 819e9, 0.0, [])]
            return {
                "model": "resnet50",
                "batch": 8192,
                "chips": chips,
                "microbatch_size": 32,
                "accumulation_steps": 1,
                "memory": 2**30,
                "roofline": roofline(programs, CHIPS["v5e"], 1, 8192, 10),
            }

        points = [point(1, 1.0), point(256, 0.005)]
        last = scaling.table(points).splitlines()[-1]
        self.assertEqual(
            last, "| resnet50 | 8,192 | 256 | 1 x 32 | 1,024 | 5.08 | 5.00 | 0.00 | compute | 1,613,824 | 77% |"
        )
        with tempfile.TemporaryDirectory() as folder:
            scaling.draw(points, f"{folder}/plot.svg")
            self.assertIn("batch 8,192", pathlib.Path(folder, "plot.svg").read_text())

    def test_the_page_has_the_committed_points(self):
        root = pathlib.Path(__file__).parents[2]
        points = json.loads((root / "results" / "pod_scaling.json").read_text())["points"]
        self.assertIn(f"\n{scaling.table(points)}\n", (root / "docs" / "pod.md").read_text())


class CommandTest(parameterized.TestCase, tf.test.TestCase):
    def run_command(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pod_check.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    @parameterized.parameters(
        (("--topology=v9:2x2",), "v5e.*Received: --topology=v9:2x2"),
        (("--topology=v5e:2x2", "--batch_size=x"), "batch_size"),
        (("--topology=v5e:2x2", "word"), "Received: word"),
        (("--topology=v5e:2x2", "--momentum=2"), "--momentum must be below 1"),
        (
            ("--topology=v5e:2x2", "--engine=tensorflow", "--shard_optimizer_state"),
            "for JAX. Received: --engine=tensorflow",
        ),
    )
    def test_one_clear_line(self, arguments, message):
        code, _, err = self.run_command(*arguments)
        self.assertEqual(code, 2)
        self.assertRegex(err, message)
        self.assertLen(err.splitlines(), 1)

    def test_outside_a_checkout(self):
        with (
            unittest_find_spec(lambda name: None),
            self.assertRaisesRegex(UsageError, "run it in the checkout"),
        ):
            pod_check.read_config([])

    def needs_compiler(self):
        if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
            self.skipTest("libtpu, the TPU compiler, is not installed: the extra `pod` has it")

    def test_unknown_shape(self):
        self.needs_compiler()
        code, _, err = self.run_command("--topology=v5e:3x3", "--engine=jax", "--batch_size=9")
        self.assertEqual(code, 2, err)
        self.assertRegex(err, "v5e:3x3 is not known to this TPU compiler: .")
        self.assertLen(err.splitlines(), 1)

    def test_a_small_model_for_a_real_chip(self):
        self.check_a_small_model("jax")

    @pytest.mark.slow
    def test_a_small_model_on_tensorflow(self):
        self.check_a_small_model("tensorflow")

    def check_a_small_model(self, engine):
        self.needs_compiler()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "check.json"
            code, out, err = self.run_command(
                "--flagfile=flags/recipes/demo.flags",
                "--batch_size=64",
                "--microbatch_size=16",
                "--topology=v5e:2x2",
                f"--engine={engine}",
                f"--out={path}",
                *(["--one_size"] if engine == "tensorflow" else []),
            )
            self.assertEqual(code, 0, err)
            result = json.loads(path.read_text())[engine]
        self.assertIn("verdict      fits", out)
        self.assertEqual((result["devices"], result["microbatch_size"], result["accumulation_steps"]), (4, 16, 1))
        (program,) = result["programs"]
        # 111,770 parameters and their momentum in float32, padded to the tiles of a TPU.
        self.assertBetween(program["arguments"], 2 * 4 * 111_000, 6 * 4 * 111_000)
        reduced = [c for c in program["collectives"] if c["kind"] == "all-reduce" and c["group"] == 4]
        self.assertBetween(sum(c["size"] for c in reduced), 4 * 111_000, 4 * 125_000)
        self.assertEqual(result["largest_microbatch_size"], 16 if engine == "jax" else None)


def unittest_find_spec(find):
    return unittest.mock.patch.object(importlib.util, "find_spec", find)


if __name__ == "__main__":
    tf.test.main()
