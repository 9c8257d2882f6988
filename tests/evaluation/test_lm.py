"""`LitGPTModel` against lm-eval's own Hugging Face model with the same weights."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation import generation
from litgpt_moe_ext.evaluation.decoding import supports_padded_cache
from litgpt_moe_ext.evaluation.generation import GenerationSettings, generate
from litgpt_moe_ext.evaluation.harness import model as harness_model
from litgpt_moe_ext.evaluation.harness.model import LitGPTModel
from litgpt_moe_ext.evaluation.sampling import Sampling
from tests.evaluation.conftest import CORPUS, END_OF_TEXT, VOCABULARY_SIZE, llama_config, write_checkpoint
from tests.models import moe_config

WORDS = " ".join(CORPUS).split()
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hf_model(llama_dir, tmp_path_factory):
    """The same weights, converted by LitGPT, in Hugging Face's Llama."""
    out_dir = tmp_path_factory.mktemp("converted")
    convert_lit_checkpoint(llama_dir, out_dir)
    config = llama_config()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_query_groups,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    model.load_state_dict(torch.load(out_dir / "model.pth"))
    return model


@pytest.fixture(params=[1, 4])
def models(request, hf_model, llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    return (
        LitGPTModel(llama_dir, device="cpu", batch_size=request.param),
        HFLM(pretrained=hf_model, tokenizer=tokenizer, batch_size=request.param),
    )


def text(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def greedy_continuation(model: LitGPTModel, context: str, n_tokens: int = 3) -> str:
    tokens = generate(
        model.model, [model.tok_encode(context)], GenerationSettings(max_gen_toks=n_tokens), lambda _: False
    )
    return model._decode(tokens[0])


def test_loglikelihoods_equal_those_of_hugging_face(models):
    ours, theirs = models
    arguments = [(text(n, n), " " + text(1 + n % 3, n + 100)) for n in range(1, 13)]
    arguments += [(text(200, 1), " yes"), (text(60, 2) + " ", "no or yes")]  # longer than the block size
    arguments += [("", "yes or no"), ("the dog", " yes"), ("the dog", " no"), ("the dog", " yes"), ("the dog ", "yes")]
    arguments += [(f"the fox{END_OF_TEXT}", f" yes{END_OF_TEXT}")]
    arguments += [(context := text(n, n + 7), greedy_continuation(ours, context)) for n in (2, 5, 8)]
    requests = instances("loglikelihood", arguments)

    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    actual = ours.loglikelihood(requests, disable_tqdm=True)

    difference = max(abs(a - e) for (a, _), (e, _) in zip(actual, expected, strict=True))
    print(f"largest difference: {difference:.1e}")
    assert difference < TOLERANCE
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in actual)
    assert not all(greedy for _, greedy in actual)


def test_rolling_loglikelihoods_equal_those_of_hugging_face(models):
    ours, theirs = models
    requests = instances("loglikelihood_rolling", [(text(n, n),) for n in (1, 5, 12, 40, 100)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    actual = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    print(f"largest difference: {max(abs(a - e) for a, e in zip(actual, expected, strict=True)):.1e}")
    assert actual == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_greedy_generations_equal_those_of_hugging_face(models):
    ours, theirs = models
    prompts = [text(n, n) for n in (1, 3, 4, 7, 30, 9)]
    whole = greedy_continuation(ours, prompts[1], 8)
    stop = whole[3:5]
    arguments = [(prompt, {"until": [stop], "max_gen_toks": 8, "do_sample": False}) for prompt in prompts]
    arguments += [(prompt, {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.0}) for prompt in prompts]
    arguments += [(prompts[0], {"max_gen_toks": 5})]
    requests = instances("generate_until", arguments)
    actual = ours.generate_until(requests, disable_tqdm=True)
    assert actual == theirs.generate_until(requests, disable_tqdm=True)
    assert actual[1] == whole[: whole.index(stop)]
    assert len(set(actual)) > 4


def test_generation_stops_at_end_of_text(models):
    ours, theirs = models
    theirs._model = copy.deepcopy(theirs.model)  # other tests use it as it is
    for model in (ours.model, theirs.model):
        # Makes the end of text, token 0, most probable wherever the first feature is large.
        model.lm_head.weight.data[0] = 0.0
        model.lm_head.weight.data[0, 0] = 8.0
    requests = instances("generate_until", [(text(n, n), {"max_gen_toks": 12}) for n in range(1, 9)])
    actual = ours.generate_until(requests, disable_tqdm=True)
    assert actual == theirs.generate_until(requests, disable_tqdm=True)
    lengths = [len(ours.tok_encode(continuation)) for continuation in actual]
    assert min(lengths) < 5 < max(lengths)


def test_generation_ends_with_the_last_text_that_is_not_finished(llama_dir, monkeypatch):
    model = LitGPTModel(llama_dir, device="cpu").model
    forward, passes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    texts = generate(model, [[5, 6], [7]], GenerationSettings(max_gen_toks=12), lambda tokens: len(tokens) == 3)
    assert [len(tokens) for tokens in texts] == [3, 3]
    assert len(passes) == 3


@pytest.fixture(scope="module")
def random_moe_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random_moe")
    changes = {"n_shared_expert": 1, "vocab_size": VOCABULARY_SIZE, "padded_vocab_size": VOCABULARY_SIZE}
    torch.manual_seed(3)
    write_checkpoint(folder, moe_config(**changes))
    return folder


def test_padding_changes_nothing_for_moe_layers(random_moe_dir):
    arguments = [(text(n, n), " " + text(1 + n % 3, n + 100)) for n in range(1, 13)]
    requests = instances("loglikelihood", arguments)
    alone, together = (
        LitGPTModel(random_moe_dir, device="cpu", batch_size=size).loglikelihood(requests) for size in (1, 12)
    )
    assert [a for a, _ in together] == pytest.approx([a for a, _ in alone], abs=TOLERANCE)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_class_name": "NoisyTopKMoE"},
        {"attention_class_name": "SinkAttention", "rope_adjustments": YARN},
        {"attention_class_name": "SinkAttention", "sliding_window_size": 4, "sliding_window_indices": [1, 0]},
    ],
)
def test_cached_generation_equals_whole_forward_passes(tmp_path, monkeypatch, changes):
    changes = {**changes, "vocab_size": VOCABULARY_SIZE, "padded_vocab_size": VOCABULARY_SIZE}
    write_checkpoint(tmp_path, moe_config(**changes))
    model = LitGPTModel(tmp_path, device="cpu")
    prompts = [model.tok_encode(text(n, n))[:20] for n in (1, 4, 8, 2)]
    settings = GenerationSettings(max_gen_toks=10)
    assert supports_padded_cache(model.model)
    cached = generate(model.model, prompts, settings, lambda _: False)
    assert all(block.attn.kv_cache is None for block in model.model.transformer.h), "its memory is given back"
    monkeypatch.setattr(generation, "supports_padded_cache", lambda _: False)
    assert cached == generate(model.model, prompts, settings, lambda _: False)
    assert all(len(tokens) == 10 for tokens in cached)


def test_sliding_window_of_litgpt_generates_without_cache(tmp_path, capsys):
    # Its ring buffer refuses prompts longer than the window.
    config = llama_config(sliding_window_size=4, sliding_window_indices=[1, 0])
    write_checkpoint(tmp_path, config)
    model = LitGPTModel(tmp_path, device="cpu", batch_size=2)
    requests = instances("generate_until", [(text(n, n), {"max_gen_toks": 4}) for n in (2, 8)])
    first, second = model.generate_until(requests)
    assert first
    assert second
    assert "without a key/value cache" in capsys.readouterr().out


def test_sampling_is_reproducible_and_differs_from_greedy(llama_dir):
    model = LitGPTModel(llama_dir, device="cpu")
    sampled = [{"do_sample": True, "temperature": 1.5, "max_gen_toks": 10, "top_k": 40, "top_p": 0.95}]
    greedy = [{"temperature": 1.5, "max_gen_toks": 10}]

    def run(settings):
        torch.manual_seed(5)
        return model.generate_until(instances("generate_until", [("the dog", s) for s in settings]))

    assert run(sampled) == run(sampled)
    assert run(sampled) != run(greedy)
    assert run(greedy) == run([{"max_gen_toks": 10}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": "four"}, "max_gen_toks: 'four' must be an integer of at least 1"),
        ({"max_gen_toks": 0}, "max_gen_toks: 0 must be an integer of at least 1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: 'hot' must be a number"),
        ({"do_sample": True, "top_k": 1.5}, "top_k: 1.5 must be an integer, or null"),
    ],
)
def test_generation_settings_of_another_kind_are_refused(settings, message):
    with pytest.raises(SettingsError, match=f"^generation_kwargs: {message}"):
        GenerationSettings.parse(settings, 8)


def test_settings_of_sampling_mean_nothing_without_it():
    settings = {"do_sample": False, "temperature": -1, "top_p": 0.0, "top_k": -1, "max_gen_toks": None}
    assert GenerationSettings.parse(settings, 8) == GenerationSettings(max_gen_toks=8)


def test_values_by_which_tasks_switch_a_limit_off():
    """As for Hugging Face's `generate`; the temperature 0 takes the likeliest token."""
    unlimited = {"do_sample": True, "top_k": 0, "top_p": None}
    assert GenerationSettings.parse(unlimited, 8).sampling == Sampling(temperature=1.0, top_k=None, top_p=1.0)
    assert GenerationSettings.parse({**unlimited, "temperature": 0}, 8).sampling.temperature == 0


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_k": None, "top_p": 0.01}])
def test_limits_of_sampling(limit):
    logits = torch.randn(50, 9)
    assert torch.equal(Sampling(temperature=1.0, **limit).choose(logits), logits.argmax(-1))


def test_blank_contexts_become_the_prefix_token(llama_dir):
    # lm-eval moves trailing spaces into the continuation, which may leave no context; its own model fails on that.
    model = LitGPTModel(llama_dir, device="cpu")
    blank, empty = model.loglikelihood(instances("loglikelihood", [(" ", "yes"), ("", " yes")]))
    assert blank == empty
    settings = {"max_gen_toks": 4}
    empty, end_of_text = model.generate_until(instances("generate_until", [("", settings), (END_OF_TEXT, settings)]))
    assert empty == end_of_text


def test_what_is_generated_where_a_task_does_not_say(llama_dir):
    """lm-eval's 256 tokens, or half of a context that has no room for them; and the tokenizer's own beginning."""
    model = LitGPTModel(llama_dir, device="cpu")
    assert (model.max_length, model.max_gen_toks) == (32, 16)
    model.model = SimpleNamespace(max_seq_length=256)
    assert model.max_gen_toks == 128
    model.model = SimpleNamespace(max_seq_length=257)
    assert model.max_gen_toks == 256
    assert model.prefix_token_id == model.eot_token_id == 0
    model._tokenizer = SimpleNamespace(eos_id=0, bos_id=7)
    assert model.prefix_token_id == 7


def test_a_stop_string_counts_in_whatever_tokens_it_comes(llama_dir, monkeypatch):
    """In more than its own encoding has; and a special token, which is not the end of the text, as any other string."""
    model = LitGPTModel(llama_dir, device="cpu")
    spelled = [token for letter in "dog" for token in model.tok_encode(letter)]
    assert len(spelled) > len(model.tok_encode("dog"))
    special = model.tok_encode(END_OF_TEXT)
    monkeypatch.setattr(LitGPTModel, "eot_token_id", None)
    ends = []

    def generate(_model, prompts, settings, is_finished):
        ends.extend(map(is_finished, ([*spelled[:2]], spelled, [*spelled, *spelled[:2]], [5, *special])))
        return [spelled]

    monkeypatch.setattr(harness_model, "generate", generate)
    settings = {"until": ["dog", END_OF_TEXT], "max_gen_toks": 4}
    assert model.generate_until(instances("generate_until", [("the", settings)])) == [""]
    assert ends == [False, True, False, True]


def test_text_ends_before_stop_string_and_end_of_text(llama_dir):
    model = LitGPTModel(llama_dir, device="cpu")
    settings = GenerationSettings(until=(END_OF_TEXT, "dog"))
    tokens = [*model.tok_encode("the quick dog jumps"), model.eot_token_id]
    assert model._text(tokens, settings) == "the quick "


def test_unsupported_generation_settings_are_refused(llama_dir):
    model = LitGPTModel(llama_dir, device="cpu")
    with pytest.raises(ValueError, match="num_beams: 4"):
        model.generate_until(instances("generate_until", [("the", {"num_beams": 4, "max_gen_toks": 4})]))
    with pytest.raises(ValueError, match="max_gen_toks: 32 leaves no room"):
        model.generate_until(instances("generate_until", [("the", {"max_gen_toks": 32})]))
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "max_gen_toks": 4, "top_k": None}
    neutral |= {"repetition_penalty": 1.0, "min_p": 0.0}
    assert model.generate_until(instances("generate_until", [("the", neutral)]))[0]


def test_continuations_that_cannot_be_scored_are_refused(llama_dir):
    model = LitGPTModel(llama_dir, device="cpu")
    for continuation in ("", " " + text(60, 1)):
        with pytest.raises(ValueError, match=r"must have 1 to 32 \(the model's block size\)"):
            model.loglikelihood(instances("loglikelihood", [("the dog", continuation)]))


def test_equal_inputs_go_through_the_model_once(llama_dir, monkeypatch):
    model = LitGPTModel(llama_dir, device="cpu", batch_size=8)
    batches = []
    original = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda tokens: batches.append(len(tokens)) or original(tokens))
    answers = model.loglikelihood(instances("loglikelihood", [("the dog", " yes"), ("the dog", " no"), ("a", " yes")]))
    assert batches == [2]
    assert len({logprob for logprob, _ in answers}) == 3


def test_training_checkpoint_opens_like_bare_weights(tmp_path):
    model = write_checkpoint(tmp_path, llama_config())
    requests = instances("loglikelihood", [("the quick", " fox")])
    bare = LitGPTModel(tmp_path, device="cpu").loglikelihood(requests)
    state = {
        "model": model.state_dict(),
        "optimizer": {"step": 3},
        "hparams": {"out_dir": str(tmp_path)},
        "iter_num": 7,
    }
    torch.save(state, tmp_path / "lit_model.pth")
    assert LitGPTModel(tmp_path, device="cpu").loglikelihood(requests) == bare


def test_dtype_is_that_of_the_checkpoint_unless_given(random_moe_dir):
    assert LitGPTModel(random_moe_dir, device="cpu").get_model_info()["model_dtype"] == torch.float32
    model = LitGPTModel(random_moe_dir, device="cpu", dtype="bfloat16").model
    assert model.lm_head.weight.dtype == torch.bfloat16
    # What must keep its precision does.
    assert model.cos.dtype == torch.float32
    assert model.transformer.h[0].mlp.gate.e_score_correction_bias.dtype == torch.float32
    for name in ("int8", "float8_e4m3fn", "nn"):
        with pytest.raises(
            ValueError, match=f"dtype: '{name}' must be one of float32, bfloat16, float16, float64 or auto"
        ):
            LitGPTModel(random_moe_dir, device="cpu", dtype=name)


def test_bfloat16_scores_are_close_to_float32(random_moe_dir):
    requests = instances("loglikelihood", [(text(n, n), " yes") for n in range(1, 9)])
    exact, rounded = (
        LitGPTModel(random_moe_dir, device="cpu", dtype=dtype, batch_size=4).loglikelihood(requests)
        for dtype in ("float32", "bfloat16")
    )
    assert [a for a, _ in rounded] == pytest.approx([a for a, _ in exact], abs=0.5)


def test_weights_of_another_model_are_refused(tmp_path):
    write_checkpoint(tmp_path, llama_config())
    torch.save({"something": torch.zeros(1)}, tmp_path / "lit_model.pth")
    with pytest.raises(ValueError, match=r"lit_model.pth does not fit model_config.yaml"):
        LitGPTModel(tmp_path, device="cpu")


def test_tokenizer_without_end_of_text_needs_a_context(tmp_path):
    write_checkpoint(tmp_path, llama_config())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model = LitGPTModel(tmp_path, device="cpu")
    assert model.loglikelihood(instances("loglikelihood", [("the", " fox")]))
    with pytest.raises(ValueError, match="names neither bos_token nor eos_token"):
        model.loglikelihood(instances("loglikelihood", [("", "fox")]))
