"""Runs inside vLLM's worker processes: loads the policy's weights from a safetensors file.

`--worker-extension-cls` names WorkerExtension so that this module is imported there, which registers the transfer engine
(https://docs.vllm.ai/en/latest/training/weight_transfer/).
"""

from dataclasses import dataclass

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, is_deferred_attention_layer

NAME = "safetensors_file"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed upon beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One update.

    Attributes:
      path: a safetensors file with Hugging Face names, readable by every worker.
    """

    path: str


class SafetensorsFile(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads all tensors of a model, or those of some of its modules, from a file."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Does nothing; every update names its file."""

    def start_weight_update(self) -> None:
        """Lets every module collect what it gets."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads a file."""
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            names = sorted(file.keys())  # a module's tensors next to each other: it is done before the next begins
            self.model.load_weights((name, file.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        """Makes the new tensors take effect; modules that got none keep theirs.

        Raises:
          ValueError: a module got some of its tensors only, so that the others would hold whatever was in memory.
        """
        for name, module in self.model.named_modules():
            info = get_layerwise_info(module)
            if not info.can_load() or is_deferred_attention_layer(module):
                continue
            padded = isinstance(module, VocabParallelEmbedding)  # has more rows than the file, and zeroes them itself
            if 0 < info.load_numel < info.load_numel_total and not padded:
                raise ValueError(
                    f"the file has a part of {name} only: {info.load_numel} of {info.load_numel_total} numbers"
                )
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                # An unembedding that is the embedding gets nothing of its own, and on the CPU multiplies by a packed copy.
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Does nothing; no connection is held."""


class WorkerExtension:
    """Adds nothing to the worker; the name by which vLLM imports this module."""


if NAME not in WeightTransferEngineFactory._registry:  # the API server's process may import it too
    WeightTransferEngineFactory.register_engine(NAME, SafetensorsFile)
