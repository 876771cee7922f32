"""A reward model behind mosec, which batches what arrives together (https://mosecorg.github.io/mosec/).

Runs as a child of `serve_oracle --backend=mosec`, which hands over the model and a secret in the environment.
"""

import hmac
import os
from typing import Any

import torch
from mosec import ClientError, Server, Worker
from transformers import AutoModelForSequenceClassification

MAX_WAIT_MS = 10  # for a batch to fill up


class Score(Worker):
    """Scores token ids by what the model's head says."""

    def __init__(self) -> None:
        super().__init__()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model, read = AutoModelForSequenceClassification.from_pretrained(
            os.environ["BRIDGE_MODEL"],
            dtype=os.environ["BRIDGE_DTYPE"],
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        if read["missing_keys"]:  # which transformers has drawn at random
            raise ValueError(
                f"{os.environ['BRIDGE_MODEL']} has no {', '.join(sorted(read['missing_keys']))}: its scores would be random"
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"expected a model with one score, {os.environ['BRIDGE_MODEL']} has {model.config.num_labels}"
            )
        self._model = model.eval().to(self._device)
        self._max_length = int(os.environ["BRIDGE_MAX_LENGTH"]) or model.config.max_position_embeddings
        self._vocab_size = model.config.vocab_size

    def deserialize(self, data: bytes) -> list[int]:
        """Reads and checks one request."""
        request: dict[str, Any] = super().deserialize(data)
        if not hmac.compare_digest(str(request.get("secret")).encode(), os.environ["BRIDGE_SECRET"].encode()):
            raise ClientError("no or a wrong secret")
        ids: list[int] = request["ids"]
        if len(ids) > self._max_length or max(ids) >= self._vocab_size:
            raise ClientError(
                f"inputs: expected at most {self._max_length} ids below {self._vocab_size}, found {len(ids)} up to {max(ids)}"
            )
        return ids

    def forward(self, data: list[list[int]]) -> list[float]:
        """Scores a batch."""
        longest, last = max(map(len, data)), {ids[-1] for ids in data}
        # The model takes the last token that is not padding for a text's end: pad with one that ends no text.
        pad = next(id for id in range(self._vocab_size) if id not in last)
        self._model.config.pad_token_id = pad
        valid = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in data], device=self._device)
        tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in data], device=self._device)
        with torch.inference_mode():
            hidden = self._model(input_ids=tokens, attention_mask=valid)
        return hidden.logits[:, 0].float().tolist()


if __name__ == "__main__":
    server = Server()
    server.append_worker(Score, num=1, max_batch_size=int(os.environ["BRIDGE_BATCH"]), max_wait_time=MAX_WAIT_MS)
    server.run()
