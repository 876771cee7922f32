"""References: the token ids that a model is to write behind a prompt, its end included."""

from sea_jax.data.prompts import DataSettings, Rendered, encode, with_arguments, write
from sea_jax.models.tokenizer import Tokenizer


def reference_ids(rendered: Rendered, tokenizer: Tokenizer, settings: DataSettings) -> list[int]:
    """Returns a prompt's reference as the model would write it: the ids that the joined text has behind the prompt's own.

    In a chat the template joins the two and ends the turn. Elsewhere a space comes first unless the prompt ends in
    whitespace or in a special token, since most tokenizers join a space to the word behind it; the EOS ends the text.

    Args:
      rendered: a prompt with a reference.
      tokenizer: the policy's.
      settings: as the prompt was rendered with.
    """
    prompt, reference = rendered.record["prompt"], rendered.record["reference"].strip()
    asked = write(prompt, tokenizer, settings)
    answer = tokenizer.quoted(reference) if settings.special_tokens == "text" else reference
    apart = not asked.text or asked.text[-1].isspace() or asked.text.endswith(tuple(tokenizer.special_tokens))
    end, text = "", answer if apart else f" {answer}"
    if asked.is_chat:
        end, tail = with_arguments(tokenizer, settings).turn_end()
        whole = write(prompt, tokenizer, settings, reference).text
        if whole.startswith(asked.text) and whole.endswith(tail):
            text = whole[len(asked.text) : len(whole) - len(tail)]
    joined = encode(asked._replace(text=f"{asked.text}{text}{end}"), tokenizer)
    count = len(rendered.tokens)
    # Where the text is cut into other tokens across the border, the reference is what it is behind any line break.
    ids = joined[count:] if joined[:count] == rendered.tokens else _behind("\n", text + end, tokenizer)
    return ids if end else [*ids, tokenizer.eos_id]


def _behind(before: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that another precedes, without what some tokenizers put at every beginning."""
    first, joined = (tokenizer.encode(part, add_special=False) for part in (before, before + text))
    return joined[len(first) :] if joined[: len(first)] == first else tokenizer.encode(text, add_special=False)
