"""One tool, one setting: compress ResNet-20, measure it, write a record.

    python -m benchmarks.peers.compress brevitas-gpfq 2w --problem problem.pt --out records

Runs from the repository's root in the environment of that tool (`run.sh` makes them), and imports
no other tool. Settings are those that a tool's documentation or example recommends for networks of
this kind; `table.py` says which, and the record repeats it. CPU seconds are those of the process
while it compresses, the tool's imports included, its evaluation not. The toolkit's own are those of
its whole command, which also reads the images from files and evaluates both networks.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.problem import Problem, read_problem
from benchmarks.peers.table import ADAROUND_STEPS, CELLS, LEARNED_ROUND_STEPS, METHODS
from obc.inputs.vision import make_importable

DATA_WORDS: list[str] = []  # options of our own commands that say where weights and images are

# -- Brevitas --------------------------------------------------------------------------------------


def brevitas(method: str, problem: Problem, wbits: int, abits: int) -> nn.Module:
    """As `brevitas_examples/imagenet_classification/ptq/ptq_evaluate.py` goes about it."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq

    loader = [(batch, None) for batch in problem.batches(64)]
    network = preprocess_for_quantize(problem.network(), equalize_iters=20, merge_bn=True)
    network = ptq.quantize_model(
        network,
        backend="layerwise",
        weight_bit_width=wbits,
        act_bit_width=None if abits == 32 else abits,
        bias_bit_width=None,
        layerwise_first_last_bit_width=wbits,
        weight_quant_granularity="per_channel",
        weight_param_method="mse",
        weight_quant_type="asym" if "asym" in method else "sym",
        act_quant_type="asym",
        act_param_method="mse",
        act_quant_percentile=99.999,
        scale_factor_type="float_scale",
        quant_format="int",
    )
    with torch.no_grad():
        network(loader[0][0])  # some grids are made in a first pass
    ptq.calibrate(loader, network)
    if "gptq" in method:
        ptq.apply_gptq(loader, network, act_order=True, create_weight_orig=True)
    elif "gpfq" in method:
        ptq.apply_gpfq(loader, network, act_order=True)
    elif "qronos" in method:
        ptq.apply_qronos(network, loader, act_order=True)
    else:
        learn_rounding(network, loader)
    ptq.apply_bias_correction(loader, network)
    return network.eval()


def learn_rounding(network: nn.Module, loader: list[tuple[Tensor, None]]) -> None:
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as utils

    options = Namespace(
        learned_round="hard_sigmoid_round",
        learned_round_loss="regularised_mse",
        learned_round_iters=LEARNED_ROUND_STEPS,
        learned_round_lr=1e-2,
        learned_round_lr_scheduler=None,
        learned_round_batch_size=32,
    )
    config = utils.parse_args_to_dataclass(options)
    config.training_args.use_amp = False  # float16 is for GPUs
    LearnedRoundTrainer(config=config).train(
        model=network,
        model_forward=utils.vision_forward,
        block_forward=utils.vision_block_forward,
        data_loader=loader,
        cache=utils.CacheVision(),
        get_blocks_fn=functools.partial(utils.get_blocks, block_check_fn=utils.is_layer),
        keep_gpu=True,
    )


# -- AIMET -----------------------------------------------------------------------------------------


def aimet(method: str, problem: Problem, wbits: int, abits: int) -> nn.Module:
    """Rounding or ranges learnt; the simulation puts the weights on the grid."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.seq_mse import apply_seq_mse

    image, batches = problem.calibration[:1], problem.batches(32)
    network = prepare_model(problem.network())  # functions become modules
    fold_all_batch_norms(network, tuple(image.shape), image)
    grid = {"quant_scheme": "tf_enhanced", "config_file": "default"}
    grid |= {"default_param_bw": wbits, "default_output_bw": 8 if abits == 32 else abits}
    with tempfile.TemporaryDirectory() as folder:
        if "adaround" in method:
            found = AdaroundParameters(
                batches, len(batches), default_num_iterations=ADAROUND_STEPS, forward_fn=forward
            )
            network = Adaround.apply_adaround(
                network,
                image,
                found,
                folder,
                "weights",
                default_param_bw=wbits,
                default_quant_scheme=grid["quant_scheme"],
                default_config_file=grid["config_file"],
            )
        simulation = QuantizationSimModel(network, image, **grid)
        if "adaround" in method:
            simulation.set_and_freeze_param_encodings(f"{folder}/weights.encodings")
        else:
            apply_seq_mse(simulation, batches, num_candidates=20, forward_fn=forward)
    for module in simulation.qmodules():  # round what the layers take in, as the others do
        if abits == 32 or isinstance(module, (nn.Conv2d, nn.Linear)):
            module.output_quantizers = nn.ModuleList([None] * len(module.output_quantizers))
        if abits == 32:
            module.input_quantizers = nn.ModuleList([None] * len(module.input_quantizers))
    with torch.no_grad():
        simulation.compute_encodings(lambda model: [model(batch) for batch in batches])
    return simulation.model.eval()


def forward(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch)


# -- MCT -------------------------------------------------------------------------------------------


def mct(method: str, problem: Problem, wbits: int, abits: int) -> nn.Module:
    """Gradient-based PTQ, on a platform of these widths."""
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit import gptq
    from model_compression_toolkit.target_platform_capabilities import constants
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import (
        tpc,
    )

    linear, _, other = tpc.get_op_quantization_configs()
    activations = {
        "enable_activation_quantization": abits < 32,
        "activation_n_bits": min(abits, 8),
        "activation_quantization_method": QuantizationMethod.UNIFORM,
    }
    linear = linear.clone_and_edit(
        attr_to_edit={constants.KERNEL_ATTR: {constants.WEIGHTS_N_BITS: wbits}}, **activations
    )
    platform = tpc.generate_tpc(other.clone_and_edit(**activations), linear, [linear], "peers")

    def batches():
        for batch in problem.batches(32):
            yield [batch.numpy()]

    network, _ = gptq.pytorch_gradient_post_training_quantization(
        problem.network(),
        batches,
        gptq_config=gptq.get_pytorch_gptq_config(
            n_epochs=int(method.rpartition("-")[2]),
            use_hessian_sample_attention="attention" in method,
        ),
        target_platform_capabilities=platform,
    )
    return network.eval()


# -- ModelOpt --------------------------------------------------------------------------------------


def modelopt(method: str, problem: Problem, *_: int) -> nn.Module:
    """SparseGPT; it chooses zeros and leaves the other weights as they are, for fine-tuning."""
    import modelopt.torch.sparsity as sparsity

    batches = problem.batches(64)
    network = sparsity.sparsify(
        problem.network(),
        "sparsegpt",
        config={"data_loader": batches, "collect_func": lambda batch: batch, "device": "cpu"},
    )
    network = sparsity.export(network)
    if "tuned" in method:
        estimate_norms(network, batches)
    return network.eval()


@torch.no_grad()
def estimate_norms(network: nn.Module, batches: list[Tensor]) -> None:
    """Running statistics of the norms anew, as means over the calibration batches."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    network.train()
    for batch in batches:
        network(batch)


# -- ours ------------------------------------------------------------------------------------------


def ours(method: str, problem: Problem, wbits: int, abits: int) -> nn.Module:
    """The command line, as anyone would call it; its checkpoint is evaluated as all others are."""
    import main_trueobs
    from obc.toolkit.session import load_compressed

    words = ["nmprune"] if wbits == 32 else ["quant", "--wbits", str(wbits), "--abits", str(abits)]
    words += METHODS[method].settings.split()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rn20.pth"
        status = main_trueobs.main(["rn20", "cifar10", *words, "--save", file, *DATA_WORDS])
        if status:
            sys.exit(status)
        network = problem.network()
        load_compressed(network, file)
    return network


# -- the command -----------------------------------------------------------------------------------

MAKERS = {
    "trueobs": ours,
    "brevitas": brevitas,
    "aimet-torch": aimet,
    "model-compression-toolkit": mct,
    "nvidia-modelopt": modelopt,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("cell", choices=list(CELLS))
    parser.add_argument("--problem", type=Path, required=True, help="the file of problem.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--images", type=int, help="calibration images, to try a method quickly")
    args, words = parser.parse_known_args()
    DATA_WORDS.extend(words)
    method = METHODS[args.method]
    if args.cell not in method.cells:
        parser.error(f"{args.method} does not go with {args.cell}")
    logging.disable(logging.INFO)
    make_importable()  # torchvision, which some tools import, next to a CPU build of PyTorch
    problem = read_problem(args.problem)
    problem.calibration = problem.calibration[: args.images]
    torch.manual_seed(0)
    cpu, wall = time.process_time(), time.perf_counter()
    network = MAKERS[method.package](args.method, problem, *CELLS[args.cell])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    record = {
        "method": args.method,
        "cell": args.cell,
        "package": method.package,
        "version": version_of(method.package),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images": len(problem.calibration),
        "settings": method.settings,
        **problem.figures(network),
        "cpu_seconds": round(cpu, 1),
        "seconds": round(wall, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.method}_{args.cell.replace(':', '')}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 0


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # ours, run from a checkout
        return "checkout"


if __name__ == "__main__":
    sys.exit(main())
