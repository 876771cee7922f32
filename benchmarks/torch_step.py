"""The baseline: one step in PyTorch and transformers, as one would write it for speed without leaving their interfaces.

- Generation is transformers' `generate` with its own attention and cache, M returned sequences per prompt.
- DPO runs all pairs in one batch, the reference under no_grad; logits at response positions only (`logits_to_keep`).
- Features come from a model that holds the first layers alone and shares their weights.
- The oracle encodes texts in batches of similar length, padded to the longest.
- The heads of the ERM are stacked and go through batched products; AdamW and Adam are the fused ones.
- In bfloat16, training is under autocast; the sampler and the reference hold bfloat16 weights.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerBase,
)

from benchmarks.inputs import Inputs, Settings

ENCODER_BATCH = 32  # texts encoded at a time


class TorchStep:
    """The parts of a step in PyTorch; `generate`, `features`, `oracle`, `erm` and `learn` are what is measured."""

    def __init__(self, settings: Settings, inputs: Inputs, policy: Path, encoder: Path):
        """Loads the models.

        Args:
          settings: Settings.
          inputs: Inputs.
          policy: directory of a Llama in the format of transformers.
          encoder: directory of a BERT in that format.
        """
        self.settings, self.inputs = settings, inputs
        self.dtype = getattr(torch, settings.dtype)
        self.words = AutoTokenizer.from_pretrained(policy)
        self.policy = load_policy(policy, torch.float32)
        self.reference = load_policy(policy, self.dtype).requires_grad_(False)
        self.sampler = self.policy if self.dtype == torch.float32 else copy.deepcopy(self.reference)
        self.trunk = first_layers(self.reference.model, settings.feature_layer)
        self.encoder = BertModel.from_pretrained(encoder, dtype=torch.float32, add_pooling_layer=False).eval()
        self.encoder.requires_grad_(False)
        self.encoder_words = AutoTokenizer.from_pretrained(encoder)
        self.anchor = {name: torch.tensor(value) for name, value in inputs.heads.items()}
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            weight_decay=0.0,
            fused=True,
        )
        self.heads = {name: value.clone().requires_grad_() for name, value in self.anchor.items()}
        self.heads_optimizer = torch.optim.Adam(
            self.heads.values(), lr=settings.erm_learning_rate, weight_decay=settings.erm_weight_decay, fused=True
        )

    def generate(self, seed: int, new_tokens: int, greedy: bool = False) -> np.ndarray:
        """Writes M responses to each prompt, all of the same length; greedy: one.

        Args:
          seed: of the sampler.
          new_tokens: T.
          greedy: take the most probable token.

        Returns:
          [B, M, T] int32.
        """
        torch.manual_seed(seed)
        if self.sampler is not self.policy:
            with torch.no_grad():
                for own, trained in zip(self.sampler.parameters(), self.policy.parameters(), strict=True):
                    own.copy_(trained)
        samples = 1 if greedy else self.settings.samples
        how = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=new_tokens,
            num_return_sequences=samples,
            temperature=None if greedy else self.settings.temperature,
            top_k=None if greedy else 0,  # the default of transformers is 50
            pad_token_id=self.inputs.pad_id,
        )
        # transformers fills None from the model's own file, so the end-of-sequence token is removed there.
        self.sampler.generation_config.eos_token_id = None
        out = cast(Any, self.sampler).generate(
            torch.from_numpy(self.inputs.tokens).long(),
            attention_mask=torch.from_numpy(self.inputs.valid).long(),
            generation_config=how,
        )
        new = out[:, self.inputs.tokens.shape[1] :].view(len(self.inputs.tokens), samples, -1)
        return cast(np.ndarray, new.numpy().astype(np.int32))

    @torch.no_grad()
    def features(self) -> np.ndarray:
        """Returns the mean hidden state over the tokens of every candidate, [B, M, d] float32."""
        rows = Rows(self.inputs, self.inputs.responses, self.inputs.lengths)
        hidden = self.trunk(rows.tokens, attention_mask=rows.valid, position_ids=rows.positions, use_cache=False)
        kept = rows.response_valid.float()[..., None]
        means = (hidden.last_hidden_state[:, -rows.num_new :].float() * kept).sum(1) / kept.sum(1)
        return means.view(*self.inputs.lengths.shape, -1).numpy()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Returns unit sentence embeddings [N, d] of N texts."""
        encoded = self.encoder_words(
            list(texts), truncation=True, max_length=self.encoder.config.max_position_embeddings
        )
        ids = encoded["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        result = torch.empty(len(ids), self.encoder.config.hidden_size)
        for start in range(0, len(ids), ENCODER_BATCH):
            rows = order[start : start + ENCODER_BATCH]
            batch = self.encoder_words.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            kept = batch["attention_mask"][..., None].float()
            result[rows] = F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
        return result

    def similarities(self, posts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the cosine of the embeddings of posts and responses.

        Args:
          posts: N texts.
          responses: a multiple of N texts.

        Returns:
          [multiple, N] float32.
        """
        vectors = self.embed([*posts, *responses])
        own, others = vectors[: len(posts)], vectors[len(posts) :]
        return (others.view(-1, *own.shape) * own).sum(-1).numpy()

    def oracle(self, posts: Sequence[str], seed: int) -> np.ndarray:
        """Decodes the candidates and labels the duels by the similarity of response and post (Bradley-Terry).

        Args:
          posts: B texts.
          seed: of the labels.

        Returns:
          [B] float32 in {0, 1}.
        """
        texts = candidate_texts(self.words, self.inputs)
        first, second = ([row[i] for row, i in zip(texts, self.inputs.duel[:, side], strict=True)] for side in (0, 1))
        rewards = self.similarities(posts, [*first, *second])
        probability = 1 / (1 + np.exp(-self.settings.oracle_scale * (rewards[0] - rewards[1])))
        return (np.random.default_rng(seed).uniform(size=len(posts)) < probability).astype(np.float32)

    def rewards(self, features: Tensor) -> Tensor:
        """Returns every head's reward: features [N, d] -> [K, N]."""
        heads = self.heads
        standardised = (features - torch.from_numpy(self.inputs.shift)) * torch.from_numpy(self.inputs.scale)
        hidden = F.relu(torch.einsum("nd,kdh->knh", standardised, heads["w1"]) + heads["b1"][:, None])
        hidden = F.relu(torch.baddbmm(heads["b2"][:, None], hidden, heads["w2"]))
        return torch.einsum("knh,kh->kn", hidden, heads["w3"]) + heads["b3"][:, None]

    def erm(self, seed: int) -> np.ndarray:
        """Computes the rewards of all candidates, then takes the ERM's gradient steps on the replay.

        Args:
          seed: of the batches drawn from the replay.

        Returns:
          [K, B, M] float32, the rewards before the steps.
        """
        settings, inputs = self.settings, self.inputs
        with torch.no_grad():
            num_prompts, samples, num_features = inputs.features.shape
            rewards = self.rewards(torch.from_numpy(inputs.features).view(-1, num_features))
        generator = torch.Generator().manual_seed(seed)
        features, labels = torch.from_numpy(inputs.replay_features), torch.from_numpy(inputs.replay_labels)
        for _ in range(settings.erm_steps):
            rows = torch.randperm(len(labels), generator=generator)[: settings.erm_batch_size]
            pairs = self.rewards(features[rows].view(-1, num_features)).view(settings.num_heads, -1, 2)
            logits = pairs[..., 0] - pairs[..., 1]
            wanted = labels[rows].expand_as(logits)
            nll = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1).sum()
            pull = sum(((self.heads[name] - self.anchor[name]) ** 2).sum() for name in self.heads)
            loss = nll + settings.anchor_strength / len(labels) * pull
            self.heads_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.heads_optimizer.step()
        return rewards.view(settings.num_heads, num_prompts, samples).numpy()

    def logprobs(self, model: LlamaForCausalLM, responses: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Returns the log-probs of response tokens.

        Args:
          model: the policy or the reference.
          responses: [B, M, T] int32.
          lengths: [B, M] int32.

        Returns:
          [B, M, T] float32; 0 on padding.
        """
        rows = Rows(self.inputs, responses, lengths)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = model(
                input_ids=rows.tokens,
                attention_mask=rows.valid,
                position_ids=rows.positions,
                logits_to_keep=rows.num_new + 1,
                use_cache=False,
            ).logits[:, :-1]
        flat = F.cross_entropy(
            logits.flatten(0, 1).float(), rows.tokens[:, -rows.num_new :].flatten(), reduction="none"
        )
        return -(flat.view_as(rows.response_valid) * rows.response_valid).view(responses.shape)

    def learn(self) -> float:
        """Takes one DPO step on all weights of the policy; returns the loss before it."""
        responses, lengths = self.inputs.duellists()
        policy = self.logprobs(self.policy, responses, lengths).sum(-1)
        with torch.no_grad():
            reference = self.logprobs(self.reference, responses, lengths).sum(-1)
        ratios = policy - reference
        sign = 2 * torch.from_numpy(self.inputs.labels) - 1
        loss = -F.logsigmoid(self.settings.beta * sign * (ratios[:, 0] - ratios[:, 1])).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return float(loss.detach())


class Rows:
    """Prompt and response side by side, one row each: a prompt is repeated for each of its M responses."""

    def __init__(self, inputs: Inputs, responses: np.ndarray, lengths: np.ndarray):
        """Builds the rows.

        Args:
          inputs: Inputs, its prompts.
          responses: [B, M, T] int32.
          lengths: [B, M] int32.
        """
        samples, self.num_new = responses.shape[1:]
        prompts = torch.from_numpy(inputs.tokens).long().repeat_interleave(samples, 0)
        prompt_valid = torch.from_numpy(inputs.valid).repeat_interleave(samples, 0)
        self.response_valid = torch.arange(self.num_new) < torch.from_numpy(lengths).reshape(-1, 1)
        self.tokens = torch.cat([prompts, torch.from_numpy(responses).long().flatten(0, 1)], 1)
        self.valid = torch.cat([prompt_valid, self.response_valid], 1).long()
        self.positions = (self.valid.cumsum(1) - 1).clamp(min=0)


def load_policy(directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """Loads a Llama whose unembedding gets its rows in one piece.

    Of the hidden states at some positions, a slice, PyTorch would make one product per row, with a copy of the whole
    unembedding for each.

    Args:
      directory: in the format of transformers.
      dtype: of the weights; the frequencies of the positions stay float32.
    """
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(),))
    return model


def first_layers(model: LlamaModel, count: int) -> LlamaModel:
    """Returns a model of the first layers, whose output is the hidden state behind them; weights are shared.

    Args:
      model: LlamaModel.
      count: layers.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    with torch.device("meta"):
        trunk = LlamaModel(config)
    trunk.embed_tokens, trunk.rotary_emb = model.embed_tokens, model.rotary_emb
    trunk.layers, trunk.norm = model.layers[:count], cast(Any, nn.Identity())
    return trunk.eval()


def candidate_texts(words: PreTrainedTokenizerBase, inputs: Inputs) -> list[list[str]]:
    """Decodes the candidates, special tokens left out.

    Args:
      words: the policy's tokenizer.
      inputs: Inputs.

    Returns:
      B lists of M texts.
    """
    return [
        [
            cast(str, words.decode(ids[:length], skip_special_tokens=True)).strip()
            for ids, length in zip(responses, lengths, strict=True)
        ]
        for responses, lengths in zip(inputs.responses, inputs.lengths, strict=True)
    ]
