"""Text to ids and back for pretrained models: byte-level BPE by the `tokenizers` library, chat templates by jinja2.

Built from a `tokenizer.json` or from the metadata of a GGUF file. Text of a user or an environment may spell a control
token: encode it with `allow_special=False`, and conversations with `encode_chat`, which does that for their contents.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollax.agents.huggingface import read_json

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
# Where the Qwen2 tokenizers cut a text before merging: contractions, words, single digits, punctuation, white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def optional(module: str):
    """Imports a library of the `models` extra, or says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise ImportError(
            f"{module.split('.')[0]} is needed for pretrained models: pip install 'rollax[models]'"
        ) from None


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its chat template; made by `load_tokenizer` or `tokenizer_from_gguf`.

    Attributes:
      backend: a `tokenizers.Tokenizer`.
      plain: the same without its added tokens, to which "<|im_end|>" is ten letters like any other.
      special: "bos_token", "eos_token", ... -> its string, where there is one.
      chat_template: a jinja2 template, or None.
    """

    backend: Any
    plain: Any
    special: dict[str, str]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can produce."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        """The id of a token's string ("<|im_end|>", or "bos_token" for whichever plays that part); None if unknown."""
        return self.backend.token_to_id(self.special.get(token, token))

    def tokens(self) -> tuple[str, ...]:
        """The readable string of every id, for people; a byte that is no character on its own shows as U+FFFD."""
        return tuple(self.decode([i]) for i in range(self.vocab_size))

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of a text. Nothing is added in front or behind.

        Args:
          text: any string.
          allow_special: whether the strings of control and other added tokens become those tokens. False for text that
            somebody else wrote.
        """
        return (self.backend if allow_special else self.plain).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; `skip_special` leaves out control tokens. For people: never encode it again for training."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def render_chat(self, messages: Sequence[dict], *, add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation by the chat template.

        Args:
          messages: `{"role": ..., "content": ...}` each.
          add_generation_prompt: end with the opening of the assistant's turn.
          **variables: further variables of the template (tools, enable_thinking, ...).
        Raises:
          ValueError: there is no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        jinja2 = optional("jinja2.sandbox")

        def refuse(message):
            raise ValueError(f"the chat template refuses the messages: {message}")

        environment = jinja2.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        template = environment.from_string(self.chat_template)
        return template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special, **variables
        )

    def encode_chat(
        self,
        messages: Sequence[dict],
        *,
        add_generation_prompt: bool = True,
        trusted: Sequence[str] = ("assistant",),
        **variables,
    ) -> list[int]:
        """Ids of a conversation; a control token spelt out in somebody else's message stays text.

        Equal to encoding `render_chat` wherever no such message spells an added token.

        Args:
          messages, add_generation_prompt, **variables: as for `render_chat`.
          trusted: roles whose messages may spell added tokens and get them: the assistant's own "<think>" and
            "<tool_call>", which templates also look for.
        """
        added = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        foreign = [m for m in messages if m.get("role") not in trusted]
        everything = json.dumps(foreign, ensure_ascii=False)
        # Each spelt-out token travels through the template as one private character, so that the template may trim
        # or move contents freely; only those characters are then encoded apart.
        free = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in everything)
        stands_for = {next(free): token for token in sorted(added, key=len, reverse=True)}

        def hide(value):
            if isinstance(value, str):
                for mark, token in stands_for.items():
                    value = value.replace(token, mark)
                return value
            if isinstance(value, dict):
                return {key: hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list | tuple) else value

        hidden = [m if m.get("role") in trusted else hide(m) for m in messages]
        text = self.render_chat(hidden, add_generation_prompt=add_generation_prompt, **variables)
        ids, start = [], 0
        for at, char in enumerate(text):
            if char in stands_for:
                ids += self.encode(text[start:at]) + self.encode(stands_for[char], allow_special=False)
                start = at + 1
        return ids + self.encode(text[start:])


def without_added_tokens(backend):
    """A copy of a backend that recognises no added tokens."""
    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    return optional("tokenizers").Tokenizer.from_str(json.dumps(description))


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None where it has no `tokenizer.json`.

    The chat template is `chat_template.jinja` or the entry of `tokenizer_config.json`, in this order.

    Raises:
      ValueError: one of the two JSON files is not what its name says.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizers = optional("tokenizers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error})") from None
    settings_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    special = {name: settings[name] for name in SPECIAL_NAMES if settings.get(name)}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in special.items()}
    return Tokenizer(backend, without_added_tokens(backend), special, template)


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer in the metadata of a GGUF file; None where the file carries no merges.

    Raises:
      ValueError: a model other than byte-level BPE, or a splitting rule other than "smollm" and "qwen2".
    """
    if "tokenizer.ggml.merges" not in metadata:
        return None
    tokenizers = optional("tokenizers")
    pre_tokenizers, decoders = optional("tokenizers.pre_tokenizers"), optional("tokenizers.decoders")
    model, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ValueError(f'tokenizer.ggml.model must be "gpt2" (byte-level BPE), got {model!r}')
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = optional("tokenizers.models").BPE({token: i for i, token in enumerate(tokens)}, merges)
    backend = tokenizers.Tokenizer(bpe)
    if rule == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif rule == "qwen2":
        backend.normalizer = optional("tokenizers.normalizers").NFC()
        first = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        raise ValueError(f'tokenizer.ggml.pre must be "smollm" or "qwen2", got {rule!r}')
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    # In the order of their ids, one at a time where the kind changes: adding must not renumber anything.
    for token, kind in added:
        entry = tokenizers.AddedToken(token, normalized=False, special=bool(kind == CONTROL))
        (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)([entry])
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
        "unk_token": "unknown_token_id",
    }
    entries = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in ids.items()}
    special = {name: tokens[i] for name, i in entries.items() if i is not None and i < len(tokens)}
    return Tokenizer(backend, without_added_tokens(backend), special, metadata.get("tokenizer.chat_template"))


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` (special tokens and chat template) into a directory."""
    (directory / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= tokenizer.special
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
