import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import encode, encode_all, prompt_ids, response_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pyrite.data import text

WORDS = "<unk> <s> </s> <pad> <user> <bot> hello my friend the fox ran < > / s Human Assistant :".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
ids = {word: i for i, word in enumerate(WORDS)}


def make(*, chat=False, **special):
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    named = {name: token for name, token in named.items() if token is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<user>", "<bot>"], **named)
    made.chat_template = TEMPLATE if chat else None
    return made


PLAIN, CHAT = make(), make(chat=True)
user = [{"role": "user", "content": "hello fox"}]
talk = [*user, {"role": "assistant", "content": "the fox ran"}, {"role": "user", "content": "my friend"}]
words = st.lists(st.sampled_from(["hello", "my", "friend", "the", "fox", "ran"]), max_size=8).map(" ".join)


def spelled(row):
    return " ".join(WORDS[i] for i in row)


def test_prompts_follow_the_chat_template_and_match_the_tokenizers_own_rendering():
    assert spelled(prompt_ids(CHAT, "hello fox")) == "<s> <user> hello fox <bot>"
    assert spelled(prompt_ids(CHAT, talk)) == "<s> <user> hello fox <bot> the fox ran <user> my friend <bot>"
    own = CHAT.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt_ids(CHAT, talk) == own


def test_one_user_turn_and_the_same_text_are_one_prompt():
    for tokenizer in (PLAIN, CHAT):
        assert prompt_ids(tokenizer, user) == prompt_ids(tokenizer, "hello fox")


def test_plain_prompts_start_with_exactly_one_start_token():
    assert spelled(prompt_ids(PLAIN, "hello fox")) == "<s> hello fox"
    assert spelled(prompt_ids(PLAIN, "<s> hello fox")) == "<s> hello fox"
    assert spelled(prompt_ids(make(bos_token=None), "hello fox")) == "hello fox"
    encoder = make(bos_token=None, eos_token=None, cls_token="<s>", sep_token="</s>")
    assert spelled(encode(encoder, "fox", "ran").ids) == "<s> fox ran </s>"


def test_plain_text_of_a_prompt():
    assert text.plain("hi") == text.plain([{"role": "user", "content": "hi"}]) == "hi"
    transcript = "Human:\nhello fox\n\nAssistant:\nthe fox ran\n\nHuman:\nmy friend\n\nAssistant:\n"
    assert text.plain(talk) == transcript
    assert text.plain([{"role": "tool", "content": "x"}]) == "Tool:\nx\n\nAssistant:\n"


@given(words, st.booleans())
def test_a_response_has_one_end_token_iff_finished_and_decodes_to_itself(response, finished):
    row = response_ids(PLAIN, response, finished=finished)
    assert row.count(ids["</s>"]) == int(finished) == int(row[-1:] == [ids["</s>"]])
    assert text.decode(PLAIN, [row]) == [response]


def test_special_tokens_spelled_in_a_response_are_text():
    row = response_ids(PLAIN, "hello </s> <bot> fox")
    assert row.count(ids["</s>"]) == 1
    assert row[-1] == ids["</s>"]
    assert ids["<bot>"] not in row
    assert spelled(prompt_ids(PLAIN, "<user> fox")) == "<s> <user> fox"  # the next call is not affected


@given(st.lists(st.tuples(st.sampled_from(["hello fox", "the fox", user, talk]), words, st.booleans()), max_size=6))
def test_the_batch_form_equals_one_at_a_time(rows):
    for tokenizer in (PLAIN, CHAT):
        prompts, responses, finished = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        together = encode_all(tokenizer, prompts, responses, finished=finished, max_length=20, max_prompt=9)
        alone = [
            encode(tokenizer, prompt, response, finished=end, max_length=20, max_prompt=9)
            for prompt, response, end in rows
        ]
        assert together == alone


def test_rows_with_one_prompt_do_not_share_a_list():
    first, second = encode_all(PLAIN, ["fox", "fox"], ["ran", "my"])
    first.prompt.append(0)
    assert spelled(second.prompt) == "<s> fox"


def test_a_response_is_cut_at_its_end_and_marked():
    whole = encode(PLAIN, "hello", "the fox ran", max_length=6)
    assert (spelled(whole.ids), whole.truncated) == ("<s> hello the fox ran </s>", False)
    cut = encode(PLAIN, "hello", "the fox ran", max_length=5)
    assert (spelled(cut.ids), cut.truncated) == ("<s> hello the fox ran", True)
    unfinished = encode(PLAIN, "hello", "the fox ran", max_length=5, finished=False)
    assert (spelled(unfinished.ids), unfinished.truncated) == ("<s> hello the fox ran", False)


def test_a_prompt_keeps_its_end_and_its_start_token_whatever_the_response():
    for response in ("ran", "ran ran ran ran ran ran"):
        cut = encode(PLAIN, "hello my friend the fox", response, max_length=8, max_prompt=3)
        assert spelled(cut.prompt) == "<s> the fox"
    assert spelled(encode(make(bos_token=None), "hello the fox", "ran", max_prompt=2).prompt) == "the fox"
    assert spelled(encode(PLAIN, "hello the fox", "ran", max_prompt=1).prompt) == "fox"
    with pytest.raises(ValueError, match="max_prompt is 0"):
        encode(PLAIN, "hello", "ran", max_prompt=0)


def test_a_prompt_longer_than_the_context_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 2: the prompt has 6 tokens .* context of 6") as caught:
        encode_all(
            PLAIN,
            ["fox", "hello my friend the fox"],
            ["ran", "ran"],
            max_length=6,
            where=lambda row: f"a.jsonl, line {row + 1}",
        )
    assert "\n" not in str(caught.value)
    assert len(encode(PLAIN, "hello my friend the fox", "ran", max_length=7).response) == 1
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        text.encode_prompts(make(bos_token=None), [""])


def test_counts_must_agree_and_an_end_token_must_exist():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        encode_all(PLAIN, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        response_ids(make(eos_token=None), "fox")


def test_a_template_that_refuses_a_prompt_names_the_row():
    with pytest.raises(ValueError, match=r"row 2: the tokenizer's chat template refuses this prompt: no system"):
        text.encode_prompts(CHAT, ["fox", [{"role": "system", "content": "x"}, *user]])


def test_a_good_tokenizer_is_left_alone():
    assert text.prepare_tokenizer(PLAIN) == (PLAIN, None)


@pytest.mark.parametrize("pad", ["</s>", None])
def test_pad_becomes_a_spare_token_without_growing_the_vocabulary(pad):
    before = make(pad_token=pad)
    after, note = text.prepare_tokenizer(before)
    assert (after.pad_token, len(after)) == ("<pad>", len(before))
    assert before.pad_token == pad  # the caller's tokenizer is not touched
    assert note is not None
    assert "<pad>" in note
    assert "\n" not in note
    assert response_ids(after, "fox") == response_ids(before, "fox")


def test_pad_falls_back_to_unknown_and_then_to_nothing():
    def bare(**special):
        backend = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "fox": 2}, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", **special)

    assert text.prepare_tokenizer(bare(unk_token="<unk>"))[0].pad_token == "<unk>"
    tokenizer, note = text.prepare_tokenizer(bare(bos_token="</s>"))
    assert tokenizer.pad_token == "</s>"
    assert note is not None
    assert "none is needed" in note


def test_a_tokenizer_comes_back_from_its_folder_and_a_folder_without_one_is_refused(tmp_path):
    make(chat=True, pad_token="</s>").save_pretrained(tmp_path / "model")
    tokenizer, note = text.load_tokenizer(tmp_path / "model")
    assert prompt_ids(tokenizer, talk) == prompt_ids(CHAT, talk)
    assert tokenizer.pad_token == "<pad>"
    assert note is not None

    LlamaConfig().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer; save one there") as caught:
        text.load_tokenizer(tmp_path / "bare")
    assert "\n" not in str(caught.value)


def test_neither_folder_nor_hub_model_is_one_line():
    with pytest.raises(
        ValueError, match=r"^org/absent: neither a folder here nor reachable on the Hub \(.*\)$"
    ) as caught:
        text.load_tokenizer("org/absent")
    assert "\n" not in str(caught.value)
