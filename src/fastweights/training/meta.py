"""Meta: a Fast Weight Layer learns, by backpropagation through its own gradient steps, to learn from what it reads.

K. Clark et al., "Meta-Learning Fast Weight Language Models" (arXiv 2212.02475): the loss is that of the fast pass, and
second-order terms are kept. The fast weights go on from step to step through some blocks in a row, as they do when a
text is read, so that the layer learns steps and decays that last; gradients reach back to the block's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler

from fastweights.errors import FastWeightsError
from fastweights.reading.stream import Stream
from fastweights.training.next_token import Targets, read_out_loss
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Int
    from torch import Tensor

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.training import MetaConfig
    from fastweights.training.blocks import TokenBlocks

LAYER = "model.fast_weight_layer."


class MetaTrainer(StageTrainer):
    """Trains the Fast Weight Layer, and the model below if `base_learning_rate` says so.

    A checkpoint holds no fast weights, so that it waits for the end of a run of blocks, with which they start anew.
    """

    config: MetaConfig

    def __init__(self, model: FastWeightsForCausalLM, config: MetaConfig, *args, **kwargs) -> None:
        layer = model.fast_weight_layer
        assert layer is not None
        model.requires_grad_(config.base_learning_rate is not None)
        layer.requires_grad_(True)
        small = (LAYER + name for name in layer.small_parameter_names())
        super().__init__(model, config, *args, **kwargs, rates=dict.fromkeys(small, config.new_rate))
        if self.args.n_gpu > 1:
            raise FastWeightsError(
                f"one process was given {self.args.n_gpu} GPUs; fast weights that go on from step to step need a "
                "process for each: use `accelerate launch`"
            )
        self.block_size = self.train_dataset.block_size  # type: ignore[union-attr]
        self.lanes = config.batch_size * self.args.world_size
        self.train_dataset = BlocksInRuns(self.train_dataset, config.blocks, self.lanes)  # type: ignore[arg-type]
        self._stream: Stream | None = None

    def learning_rate_of(self, name: str) -> float:
        if name.startswith(LAYER):
            return super().learning_rate_of(name)
        assert self.config.base_learning_rate is not None
        return self.config.base_learning_rate

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        blocks: BlocksInRuns = self.train_dataset  # type: ignore[assignment]
        return RunSampler(len(blocks), blocks.run, self.lanes, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, begins = inputs["input_ids"], inputs["begins_with_a_document"]
        if self.config.base_learning_rate is None:
            self.model.model.base.eval()  # type: ignore[union-attr]  (frozen: it does not drop out either)
        if self._stream is None or begins.all():
            self._stream = Stream(self.model, self.block_size)  # type: ignore[arg-type]
        self._stream.detach()
        cache = self._stream.cache_for(input_ids.shape[1])
        positions = self._positions(inputs["position_ids"], begins, cache.get_seq_length())
        starts = inputs["position_ids"] == 0
        starts[:, 0] = begins
        outputs = model(
            input_ids=input_ids,
            position_ids=positions,
            document_starts=starts,
            cache=cache,
            use_cache=True,
            loss_of=read_out_loss,
            targets=Targets(inputs["labels"]),
        )
        self.loss_is_scaled_for_ga = False
        if inputs["ends"].any():
            self._stream = None
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _positions(
        self, position_ids: Int[Tensor, "B T"], begins: Bool[Tensor, " B"], read: int
    ) -> Int[Tensor, "B T"] | None:
        """Of each token in its document; None where the model numbers them alike by itself."""
        if read == 0:
            self._following = torch.zeros_like(position_ids[:, 0])
        positions = stream_positions(position_ids, begins, self._following)
        self._following = positions[:, -1] + 1
        own = torch.arange(read, read + positions.shape[1], device=positions.device)
        return None if bool((positions == own).all()) else positions

    @property
    def may_save(self) -> bool:
        return self._stream is None

    def run(self, *, resume: bool) -> None:
        super().run(resume=resume)
        self.model.requires_grad_(True)  # type: ignore[union-attr]


def stream_positions(
    position_ids: Int[Tensor, "B T"], begins: Bool[Tensor, " B"], following: Int[Tensor, " B"]
) -> Int[Tensor, "B T"]:
    """Positions of the next block of each row of a stream, in the document that each token belongs to.

    A document that goes on from the block before counts on; positions that do not grow, or a 0 after something was
    read, tell the model to start anew.

    Args:
        position_ids: of the block by itself: 0 at its first token and where documents start.
        begins: whether a document starts at a row's first token.
        following: position of the token after the last one that each row has read.
    """
    starts = position_ids == 0
    starts[:, 0] = begins
    goes_on = starts.cumsum(1) == 0
    return position_ids + following[:, None] * goes_on


class BlocksInRuns(Dataset):
    """Blocks of text that belong together by the run, each of which says if a run ends, or a document starts, with it.

    Args:
        blocks: consecutive blocks of one text.
        run: blocks of a run; fewer where the text is too short for so many in every lane.
        lanes: runs that are read side by side.
    """

    def __init__(self, blocks: TokenBlocks, run: int, lanes: int) -> None:
        self.blocks = blocks
        self.run = max(1, min(run, len(blocks) // lanes))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            **self.blocks[index],
            "ends": index % self.run == self.run - 1,
            "begins_with_a_document": self.blocks.begins_with_a_document(index),
        }


class RunSampler(Sampler[int]):
    """Runs in a random order, several side by side: the next block of a run comes `lanes` places after each.

    Args:
        blocks: how many there are.
        run: how many make up a run.
        lanes: runs side by side.
        seed: of the order.
    """

    def __init__(self, blocks: int, run: int, lanes: int, seed: int) -> None:
        self.run, self.lanes, self.seed, self.epoch = run, lanes, seed, 0
        self.all_runs = blocks // run
        self.runs = self.all_runs // lanes * lanes  # of an epoch; others are left out in the next

    def set_epoch(self, epoch: int) -> None:
        """Another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.runs * self.run

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.all_runs, generator=generator)[: self.runs]
        starts = self.run * order.view(-1, self.lanes)
        return iter((starts[:, None] + torch.arange(self.run)[:, None]).flatten().tolist())
