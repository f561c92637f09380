"""Models of lm-evaluation-harness that run on an engine: the extra `lm-eval`."""

from __future__ import annotations

import math
from typing import Any

from hybridgen.config import EngineConfig
from hybridgen.engine import Engine
from hybridgen.errors import ConfigError, TokenizerError, shown
from hybridgen.params import SamplingParams
from hybridgen.text.chat_templates import apply_chat_template

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("evaluation needs lm-evaluation-harness; pip install 'hybridgen[lm-eval]'") from error

NAME = "hybridgen"
"""What `--model` and `simple_evaluate(model=...)` call it, once this module is imported."""


@register_model(NAME)
class HybridgenLM(TemplateLM):
    """An engine as a model of lm-evaluation-harness, with the scores of its own Hugging Face model.

    All requests of a kind go to the engine at once: it batches them, and computes what they begin with once.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **fields: Any,
    ) -> None:
        """
        Args:
            pretrained: a local path, hub id or live `PreTrainedModel`, an `Engine`, which stays open, or None for the
                demo model.
            max_length: tokens of a context with its continuation at most; None: the engine's `max_context`.
            max_gen_toks: tokens to generate where a task does not say how many.
            add_bos_token: whether text is encoded with special tokens; None: as the tokenizer does.
            prefix_token_id: what a text without a context stands behind; None: the tokenizer's beginning, else its end.
            batch_size, max_batch_size: taken because the harness gives them; the engine's `max_batch` says how many
                requests run at once.
            fields: of `EngineConfig`.

        Raises:
            ConfigError: an unknown keyword, or fields for an engine that is loaded already.
            TokenizerError: the model has no tokenizer.
            LoadError, EngineError: see `Engine.load`.
        """
        super().__init__()
        if isinstance(pretrained, Engine):
            fields = {name: value for name, value in fields.items() if name != "device"}
            if fields or tokenizer is not None:
                raise ConfigError(f"{next(iter(fields), 'tokenizer')}= cannot be changed on a loaded Engine")
            self.engine = pretrained
        else:
            self.engine = Engine.load(pretrained, EngineConfig.of(None, fields), tokenizer=tokenizer)
        found: Any = self.engine.tokenizer
        if found is None:
            raise TokenizerError("evaluation needs a tokenizer and the model has none; pass tokenizer=")
        self.tokenizer: Any = found
        self._max_length = self.engine.max_context if max_length is None else max_length
        self._max_gen_toks = max_gen_toks
        self._special = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
        self._prefix = prefix_token_id
        self._template_args = chat_template_args or {}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context stands behind."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that a context and its continuation have at most, the last one not counted."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say how many."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; without special tokens where it begins with the tokenizer's beginning of text already."""
        special = self._special if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode([self.prefix_token_id]))):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat."""
        turn = {"add_generation_prompt": True} if add_generation_prompt else {"continue_final_message": True}
        return str(apply_chat_template(self.tokenizer, chat_history, tokenize=False, **turn, **self._template_args))

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        if not requests:
            return []
        prompts, completions = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is over max_length={self.max_length}; raise it"
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            start = len(whole) - len(continuation)
            prompts.append(whole[:start])
            completions.append(whole[start:])
        answers = []
        for (texts, _, _), score in zip(requests, self.engine.score(prompts, completions), strict=True):
            if score.error is not None:
                raise score.error
            answer = score.sum, all(score.is_greedy)
            answers.append(answer)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows as long as the context; see `LM.loglikelihood_rolling`."""
        windows: list[Any] = []
        counts = []
        for request in requests:
            [text] = request.args
            found = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            counts.append(len(found))
            windows += [(None, list(context), list(continuation)) for context, continuation in found]
        sums = iter(self._loglikelihood_tokens(windows))
        answers = []
        for request, count in zip(requests, counts, strict=True):
            answers.append(math.fsum(next(sums)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop strings."""
        prompts, params, stops = [], [], []
        end = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            context, given = request.args
            fields: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
            until = handle_stop_sequences(fields.pop("until", None), eos=end)
            new = fields.pop("max_gen_toks")
            if not fields.pop("do_sample", False):
                fields["temperature"] = 0.0
            unknown = fields.keys() - SamplingParams.field_names()
            if unknown:
                raise ConfigError(f"a task asks to generate with {shown(sorted(unknown))}, which is not known here")
            room = self.max_length - new
            if room < 1:
                raise ConfigError(f"a task asks for {new} tokens, and max_length is {self.max_length}; raise it")
            prompts.append(self.tok_encode(context)[-room:])
            params.append(SamplingParams(max_new_tokens=new, stop=[text for text in until if text], **fields))
            stops.append(until)
        if not prompts:
            return []
        texts = []
        for request, out, until in zip(requests, self.engine.generate(prompts, params), stops, strict=True):
            if out.error is not None:
                raise out.error
            texts.append(postprocess_generated_text(out.text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts
