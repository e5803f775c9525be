import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from farm.config import UserError
from farm.data.chat import encode_chat, encode_pair, read_template

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens; it puts <s> before every text by itself, as Llama's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    from tokenizers.processors import TemplateProcessing

    backend = made.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def test_a_prompt_ends_where_the_answer_begins_and_starts_with_one_bos(tokenizer):
    ids = encode_chat(tokenizer, QUESTION)
    assert tokenizer.decode(ids) == "<s><|user|>hi</s>\n<|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_targets_own_template_replaces_the_tokenizers(tokenizer):
    ids = encode_chat(tokenizer, QUESTION, "Q:{{ messages[0].content }} A:")
    assert tokenizer.decode(ids) == "Q:hi A:"


def test_a_pair_begins_with_the_prompt_as_it_is_decoded_and_ends_with_the_stop_token(tokenizer):
    ids, num_prompt_tokens = encode_pair(tokenizer, QUESTION, "hello")
    assert ids[:num_prompt_tokens] == encode_chat(tokenizer, QUESTION)
    assert tokenizer.decode(ids[num_prompt_tokens:]) == "hello</s>"
    assert ids[-1] == tokenizer.eos_token_id


def test_a_pair_of_a_template_that_rewrites_the_prompt_still_ends_with_the_stop_token(tokenizer):
    template = "{% if add_generation_prompt %}Q:{% else %}R:{% endif %}{{ messages[0].content }}"
    ids, num_prompt_tokens = encode_pair(tokenizer, QUESTION, "hello", template)
    assert tokenizer.decode(ids[:num_prompt_tokens]) == "Q:hi"
    assert tokenizer.decode(ids[num_prompt_tokens:]) == "hello</s>"


@pytest.mark.parametrize(
    ("template", "told"),
    [("{{ raise_exception('no') }}", "no"), ("{% if %}", "fails on a prompt"), ("{# nothing #}", "no token")],
)
def test_a_template_that_fails_is_the_users_mistake(tokenizer, template, told):
    with pytest.raises(UserError, match=told):
        encode_chat(tokenizer, QUESTION, template)


def test_a_tokenizer_without_a_template_asks_for_one(tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="set the target's chat_template"):
        encode_chat(plain, QUESTION)


def test_a_template_is_read_from_a_file_or_taken_as_text(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ x }}")
    assert read_template(str(tmp_path / "chat.jinja")) == read_template("{{ x }}") == "{{ x }}"
    assert read_template(None) is None
    with pytest.raises(UserError, match="cannot be read"):
        read_template(str(tmp_path / "gone.jinja"))
