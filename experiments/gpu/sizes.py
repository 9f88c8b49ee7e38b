"""How much the GPU check computes, how near the CPU its numbers have to be, and the settings of its long tail."""

import dataclasses

from experiments import bench

TOLERANCE = {"loss": 1e-5, "update": 5e-3, "params": 1e-2, "states": 1e-2}
"""Of the relative differences between device and CPU in float32 at the highest matmul precision; see `judged`."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: on a GPU, and in the rehearsal."""

    first_methods: str = "ce, lpl, lpa(site=stage1), at, mixup, sam"  # also at the device's default precision
    more_methods: str = "at(step=unit), la, isda, lpa, dropout, ls, focal, lpg, clip, noise, pugd"
    other_methods: str | None = None  # for the part others; None: all others of the library
    number_model: str = "resnet8"
    number_batch: int = 16
    number_image: int = 16
    trials: int = 6
    conv_model: str = "resnet8"
    width: int | None = None  # of all models but the long tail's
    image_size: int = 32
    bench_models: tuple[str, ...] = ("resnet20", "resnet32")
    bench_methods: str = bench.BenchSettings.methods
    batch_size: int = 128
    rounds: int = 11
    most_steps: int = 50  # in a round, for each program
    train_model: str = "resnet32"
    examples: int = 12_800  # of the random training set behind the data rates and, without --data, the seeds side by side
    train_epochs: int = 3
    repeats: int = 3
    long_model: str = "resnet32"
    long_data: str | None = None


TINY = Sizes(
    first_methods="ce", more_methods="lpa(site=stage1), cosface", other_methods="dac", number_model="mlp", number_image=8, trials=2,
    conv_model="cnn", width=4, image_size=8, bench_models=("mlp",), bench_methods="lpa(site=stage1), sam", batch_size=16,
    rounds=2, most_steps=2, train_model="cnn", examples=64, train_epochs=2, repeats=2, long_model="mlp", long_data="digits",
)  # fmt: skip

LONG_TAIL = (
    "ce, la, lpl(split=frequency, tau=0.4, bound=varied_by_frequency(0, 2.5), step_size=0.3), "
    "lpg(split=frequency, bound=varied(0.1, 0.4)), lpa(split=frequency, bound=varied(0.1, 0.2)), sam"
)
"""From the papers: LPL τ in {0.4C, 0.5C, 0.6C}, ε = 0, Δε in {1.5, 2.5, 5}, α in {0.1, 0.2, 0.3}; LPG split at the median count, ε in
[0.1, 0.5]; LPA T = 3, β = 0.7, ε in [0.05, 0.3]; SAM ρ = 0.05. LPG's and LPA's own values were chosen by validation and are not told."""
