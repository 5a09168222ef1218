"""The character tokenizer of `fila-nano`: every printable ASCII character is a token.

Characters let a small model spell words, numbers and dates that it never saw, and the whole vocabulary is 102 rows. The
ids are fixed for good, checkpoints depend on them: seven special tokens, then the characters in ASCII order.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<image>",
    "<user>",
    "<assistant>",
)
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = SPECIAL_TOKENS
CHARACTERS = tuple(chr(code) for code in range(ord(" "), ord("~") + 1))
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}

# A message's text is taken as it is, or from its parts; the pictures of a message come before its text, in their order.
# A system message has no token of its own: its text opens the first question. `generation` marks what the model has to
# learn. Whatever could only be left out is refused.
CHAT_TEMPLATE = (
    "{%- macro text_of(message) -%}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- elif message['content'] is defined and message['content'] is sequence"
    " and message['content'] is not mapping -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' and part['text'] is string -%}"
    "{{- part['text'] -}}"
    "{%- elif not (part['type'] == 'image' and message['role'] == 'user') -%}"
    "{{- raise_exception('expected parts of type text, and image in the role user, got type '"
    " ~ part['type'] ~ ' in the role ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}"
    "{{- raise_exception('expected a text or a list of parts in the role ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if tools or documents -%}"
    "{{- raise_exception('expected neither tools nor documents, which this model was not trained on') -}}"
    "{%- endif -%}"
    "{%- set state = namespace(system='', started=false) -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and not state.started -%}"
    "{%- set state.system = state.system ~ text_of(message) ~ ' ' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<user>' -}}"
    "{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- state.system ~ text_of(message) -}}"
    "{%- set state.system = '' -%}"
    "{%- set state.started = true -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<assistant>' -}}"
    "{%- generation -%}"
    "{{- text_of(message) ~ '<eos>' -}}"
    "{%- endgeneration -%}"
    "{%- set state.started = true -%}"
    "{%- else -%}"
    "{{- raise_exception('expected the role user or assistant, or system before these, got ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if state.system -%}"
    "{{- raise_exception('expected a user message behind the system message') -}}"
    "{%- endif -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def build_character_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer and chat template of `fila-nano`, built from nothing.

    Ids 0 to 6 are `<pad> <bos> <eos> <unk> <image> <user> <assistant>`, 7 to 101 the characters from space to `~`.
    Printable ASCII survives `decode(encode(text))` exactly, runs of spaces included; any other character, a line break
    too, becomes `<unk>`. Nothing is added around a text: `<bos>` and the turns come from the chat template. A special
    token spelled out in a text *is* that token, as in every transformers tokenizer; `FilaProcessor` counts the images.

    Returns:
        A `PreTrainedTokenizerFast` that pads on the left, where generation needs it, with `image_token` set.

    Example:
        >>> tokenizer = build_character_tokenizer()
        >>> tokenizer("Hi  9").input_ids
        [47, 80, 7, 7, 32]
        >>> tokenizer.decode([47, 80, 7, 7, 32])
        'Hi  9'
    """
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    # Every character by itself; `.` alone would leave line breaks glued to their neighbours.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        # By name, so that `tokenizer.image_token` exists after a reload too, which the processor looks up.
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
