"""TreeRPO (Tree Relative Policy Optimization, arXiv 2506.05183) in one file: an independent re-implementation.

The algorithm, once per training step:
  1. grow      for each question sample an N-ary tree; a child continues its parent from the parent's KV cache
  2. verify    score the text of every leaf 0 or 1 against the known answer
  3. back up   the reward of an inner node is the mean of its children's rewards, bottom-up
  4. compare   siblings form a step-level group; advantage = (reward - group mean) / normaliser
  5. update    clipped policy gradient on each step's own tokens, every unique token scored once
GRPO is the tree of depth 1; GSPO takes one ratio per step; TreeAdv (arXiv 2601.03703) forks at uncertain tokens.

One small tree by hand, branching 2 2 (leaf rewards -> backup -> advantages, normaliser bernoulli):
    root .75 -+- a .5 -+- 1     group {1, 0}:   mean .5,  sqrt(.5 * .5)   = .5    ->  +1    and  -1
              |        +- 0
              +- b  1 -+- 1     group {1, 1}:   no spread                         ->  0, not in the update
                       +- 1     group {.5, 1}:  mean .75, sqrt(.75 * .25) = .433  ->  -.577 and  +.577

Differences from the paper, of which only the abstract and summaries could be read (README.md says more):
  1. normaliser: the paper's formula could not be read; bernoulli, sqrt(mu (1 - mu)), is our default
  2. pruning: the paper's rule could not be read; groups without spread are dropped, near-ties by --min-group-std
  3. loss: PPO clip, no KL term, no reference model; divided once by the number of all sampled tokens
  4. tree shape and step length: ours, sized for one GPU

    python treerpo.py                                    # the bundled model and task, minutes on a CPU
    python treerpo.py --model Qwen/Qwen2.5-Math-1.5B     # MATH on one 80 GB GPU
    python treerpo.py --algo grpo --print-tree           # a baseline, and a look at its samples

Flags: type, default, default of the bundled demo (= the same, - none), meaning. This table is what the parser reads.
model and data
  --model               str    -  demo/model  folder or hub id; without it the bundled model and all demo defaults
  --data                str    nlile/hendrycks-MATH-benchmark  demo/train.jsonl  file or hub ID[:CONFIG[:SPLIT]]
  --eval-data           str    HuggingFaceH4/MATH-500::test  demo/test.jsonl  held out; with --data alone: a fifth of it
  --question-column     str    -  =  column of the question, if not found by its usual names
  --answer-column       str    -  =  column of the answer, if not found by its usual names
  --template            str    -  =  qwen-math (if the tokenizer knows <|im_end|>), none (else), chat, or a text file
  --out                 str    -  =  output folder; without it runs/ALGO-DATE-TIME
  --resume              str    -  =  continue the run in this folder, with its own flags
tree
  --algo                treerpo|grpo|gspo|treeadv  treerpo  =  named set of --branch-at, --advantage and --ratio
  --branch-at           fixed|entropy  fixed  =  every --step-len tokens, or at uncertain tokens (treeadv)
  --branching           ints   8,2,2  4,2,2,2  children of a node at each level; depth 1: 32, demo 8
  --step-len            ints   384  14  tokens of a step, one number or one a level; depth 1: 1152, demo 56
  --leaves              int    32  8  entropy branching: rollouts per question in all
  --trees               int    8  4  entropy branching: first rollouts per question, the others fork from them
  --entropy-threshold   float  1.0  0.3  entropy branching: nats above which a token may fork
  --temperature         float  1.0  =  of sampling and scoring alike
  --questions-per-step  int    16  =  questions of one batch
learning
  --steps               int    300  40  training steps, one batch each
  --lr                  float  1e-6  2e-4  AdamW learning rate, after 5 steps of linear warm-up
  --advantage           siblings|leaves|both  siblings  =  compare siblings, redistribute leaves' (treeadv), or the sum
  --ratio               token|sequence  token  =  importance ratio per token, or per step (gspo)
  --clip-eps            float  0.2  =  PPO clip range, 1 +- this; gspo 4e-4
  --updates-per-batch   int    1  =  optimiser steps on each batch
  --normalizer          bernoulli|std|none  bernoulli  =  divisor of the advantages
  --level-weight        tokens|levels  tokens  =  every token alike, or every depth alike
  --min-group-std       float  0.0  =  drop groups whose rewards have at most this population standard deviation
  --seed                int    0  =  of sampling, data order and evaluation
memory and speed
  --max-rows            int    512  2048  sequences of one generate call; bounds the KV cache
  --pack-len            int    4096  512  tokens of one training forward; bounds the activations
  --grad-checkpointing  flag   -  =  compute activations again in the backward pass
  --dtype               auto|float32|mixed|bfloat16  auto  =  mixed (auto on CUDA): float32 weights, bf16 work
  --device              auto|cpu|cuda  auto  =  where to run
evaluation and output
  --eval-every          int    20  10  steps between evaluations
  --eval-questions      int    128  256  held-out questions used, the first ones
  --eval-samples        int    4  8  k of avg@k
  --save-every          int    50  20  steps between checkpoints
  --keep                int    2  =  newest checkpoints kept
  --print-tree          flag   -  =  print the first tree of every step
  --dump-trees          str    -  =  write every node as a JSON line to this file
Exit status: 0 done, 2 bad input, 130 interrupted (after saving), 1 anything else.
"""
import argparse, json, math, operator, os, random, re, resource, shutil, signal, sys, time
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import datasets, huggingface_hub, torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

HERE = Path(__file__).resolve().parent

class BadInput(ValueError):
    """Something the user gave cannot work; the message names it and the fix. Exit status 2."""

def require(condition, message):
    if not condition:
        raise BadInput(message)

# --------------------------------------------------------------------------------------------------- prompts and data
QWEN_MATH = ("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
             "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")  # Qwen2.5-Math's own evaluation prompt

def load_template(name, tokenizer):
    """--template -> a text with {question} in it. Raises BadInput."""
    known = {"qwen-math": QWEN_MATH, "none": "{question}"}
    name = name or ("qwen-math" if "<|im_end|>" in tokenizer.get_vocab() else "none")
    if name == "chat" and tokenizer.chat_template:
        turns, bos = [{"role": "user", "content": "{question}"}], tokenizer.decode(tokenizer.encode(""))
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        known["chat"] = chat.removeprefix(bos)  # encode() puts it in front itself
    text = known.get(name) or (Path(name).read_text("utf-8", "replace") if os.path.isfile(name) else "")
    require("{question}" in text, f"--template {name}: not {'/'.join(known)} or a file with {{question}} in it")
    return text

def build_prompt(question, template, tokenizer):
    """Question -> prompt token ids, in training and evaluation alike."""
    return tokenizer.encode(template.replace("{question}", question))

def use_hub_or_cache():
    """If the hub does not answer, look only into its local cache: at once, not after minutes of retries."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=8)  # any answer will do
    except Exception:  # of the HTTP library
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True

def read_rows(source):
    """A .jsonl, .json or .parquet file or a hub data set ID[:CONFIG[:SPLIT]] -> rows. Raises BadInput."""
    suffix, line = Path(source).suffix, 0
    try:
        if suffix == ".jsonl":
            return [json.loads(text) for text in open(source, "rb") if (line := line + 1) and text.strip()]
        if suffix in (".json", ".parquet"):
            return datasets.load_dataset(suffix[1:], data_files=source, split="train")
        use_hub_or_cache()
        name, config, split = f"{source}::".split(":")[:3]
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as e:  # a dozen unrelated types say "not there", "not reachable" or "not readable"
        place = f"{source} line {line}" if line else source
        why = e.__cause__ or e
        raise BadInput(f"cannot read {place} ({why!r:.200}); give a local .jsonl, .json, .parquet, or a hub id") from e

def pick(row, place, wanted, usual):
    """The row's value in the wanted column, else in the first usual one it has, in whatever case. Raises BadInput."""
    columns = {str(name).lower(): name for name in row} if isinstance(row, dict) else {}
    found = [columns[name] for name in ([wanted.lower()] if wanted else usual) if name in columns]
    require(found, f"{place}: no {wanted or '/'.join(usual)} in columns {[*columns]}; name it by --{usual[0]}-column")
    return row[found[0]]

def load_questions(source, question_column=None, answer_column=None, skip_unanswered=False):
    """-> [{"id": row number from 0, "question": str, "answer": str, number or list}]. Raises BadInput."""
    questions, odd, rows = [], [], read_rows(source)
    for number, row in enumerate(tqdm(rows, source, leave=False, delay=2)):
        place = f"{source} row {number + 1}"
        question = pick(row, place, question_column, ["question", "problem"])
        answer = pick(row, place, answer_column, ["answer", "final_answer", "solution"])
        answer = answer.rsplit("####", 1)[-1].strip() if isinstance(answer, str) else answer  # GSM8K
        golds = answer if isinstance(answer, list) else [answer]
        known = golds and all(type(gold) in (str, int, float) and str(gold).strip() for gold in golds)
        require(isinstance(question, str) and question.strip(), f"{place}: the question must be text: {question!r:.80}")
        require(known or skip_unanswered, f"{place}: the answer must be text or a number, not {answer!r:.80}")
        if known:
            question = question.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be tokenized
            questions.append({"id": number, "question": question, "answer": answer})
            golds = [extract_boxed(gold) or gold for gold in map(str, golds)]
            odd += [gold for gold in golds if not (gold.isdigit() or read_answer(normalize_answer(gold)))]
    require(questions, f"{source}: no question is in it")
    if odd or len(questions) < len(rows):
        missing = len(rows) - len(questions)
        print(f"{source}: {missing} rows without an answer left out, {len(odd)} answers match only as text: {odd[:3]}")
    return questions

def fit_context(questions, name, template, tokenizer, budget, context):
    """Add each question's prompt tokens; leave out questions whose prompt and answer together exceed the context."""
    for q in tqdm(questions, "prompts", leave=False, delay=2):
        q["prompt"] = build_prompt(q["question"], template, tokenizer)
    kept = [q for q in questions if 0 < len(q["prompt"]) <= context - budget]
    require(kept, f"{name}: no question fits, depth x --step-len takes {budget} of {context} tokens; lower --step-len")
    print(f"{name}: {len(kept)} questions, {len(questions) - len(kept)} left out as too long for the context")
    return kept

# -------------------------------------------------------------------------------------------------- verifiable reward

# LaTeX is respelled by tables, then one small parser gives the value of an answer: exact in rational numbers, to ten
# digits once roots or pi enter, at fixed points if there are variables. Work is bounded before it is done (characters,
# bits of a number), so no timeout is needed. Precision comes before recall: what cannot be read equals nothing else.
MAX_CHARS, MAX_BITS = 300, 4096
# Spellings of one character; ⦃⦄ are \{ \}, ⟦⟧ enclose a matrix, ¶ ends its row, ⟨⟩ enclose a unit, '' a word or 12_{3}.
SYMBOLS = {name: names.split()[0] for names in r"""⦃ \{; ⦄ \}; ( \langle; ) \rangle; ≤ \le \leq \leqslant; ± \pm; = \in;
    ≥ \ge \geq \geqslant; ≠ \ne \neq; , \cup ∪; * \cdot \times × ·; / \div; - −; ° \circ; ∞ \infty; π \pi; \sqrt √;
    ∅ \emptyset \varnothing; α \alpha; β \beta; θ \theta; λ \lambda""".split(";") for name in names.split()}
TEXT = r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it|bb)|mbox|boldsymbol) *"
UNIT = r"(?:[cmk]m|ft|in|mph|kg|(?<= )[a-z]{4,}(?: [a-z]+)*)(?:/[a-z]+)?(?:\^\d)?(?= *\.?(?:$|[,;)\]⦄⟧&¶=]))"
FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log"
REWRITES = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in (
    (r"\\\\", "¶"), (r"\\begin\{[pb]matrix\}", "⟦"), (r"¶?\s*\\end\{[pb]matrix\}", "⟧"), (r"\\[dtc]frac", r"\\frac"),
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle|rm|bf)(?![A-Za-z])\.?|\\[()\[\]!]|\{,\}|\\?[$£€%]|\\angle", ""),
    (r"(\\[,;: ]|\\q?quad|\s|~)+", " "), (";", ", "), (r"(?<=[{(]) | (?=[)}])", ""), (r"\\frac ?(\w)", r"\\frac{\1}"),
    # the name of a function is no product of letters: sin 2x and P(2x) are not 2 sin x and 2P(x)
    (rf"(?<![A-Za-z\\])(sqrt|pi|{FUNCTION}|[a-z]{{3,}}(?=\()|[fghA-Z](?=\([^()]*\)(?! ?=)))(?![a-z])", r"\\\1"),
    (r"\\[A-Za-z]+|\\[{}]|[^\x00-\x7f]", lambda match: SYMBOLS.get(match[0], match[0])), (r"\^? ?\{?°\}?", "⟨degree⟩"),
    (rf"[,; ]*({TEXT}\{{[, ]*)?(?<![A-Za-z])(and|or)(?![A-Za-z])[, ]*\}}?[, ]*", ", "), (r"\^\{(\w)\}(?!\d)", r"^\1"),
    (rf"(?<=[\d}})π]) *((/? ?(?!\\math[^r]|\\b){TEXT}\{{(?![abeinxyz]\}})[^{{}}]*\}} ?(\^ ?\d)?)+|{UNIT})", r"⟨\g<0>⟩"),
    (TEXT + r"\{([^{}]*)\}", r"\1"), (r"\\sqrt(?! ?\[)", r"\\root{2}"), (r"\\sqrt ?\[(\w+)\]", r"\\root{\1}"),
    # mixed numbers: 1\frac12, 1 1/2; e-forms; thousands: 1,234 and 1 234 are one number, "1, 234" and (1,234) are two
    (r"(?<![\w.^}/])(\d+) ?(\\frac ?\{\d+\} ?(?:\d|\{\d+\})|(?<= )\d+/\d+)(?!\.?\d)", r"(\1+\2)"),
    (r"(?<![\d.])(\d*\.?\d+)[eE]([+-]?\d{1,3})(?![\d.])", r"(\1*10^{\2})"), (r"_(\d+|[A-Za-z])", r"_{\1}"),
    (r"(?<![\d.,(\[⦃])(?<![(\[⦃]-)\d{1,3}([, ]\d{3})+(?![\d)\]⦄]|[, ]\d)", lambda match: re.sub("[, ]", "", match[0])),
    (r"(?<=}) |(?<!\d) | (?!\d)|[,: ]*\.?$", ""), (r"(?<=\w\w)s⟩", "⟩"), (r"([^,⦃⦄]*)±([^,⦃⦄]*)", r"\1+\2,\1-\2"),
    (r":00(?!\d)", ":60"),  # full hours: with a factor 0, am and pm would be equal
    (r"⦃ ?⦄", "∅"), (r"(\.\d*)(?=\(\d+\))|-(?=⦃)", r"\1\\"),  # 0.(3), R-{0}: not a product, not a number taken off
    (r"(?<![^,(\[⦃=&-])((?i:no|[a-z]{3,}[a-z\d-]*)|[IVX]{2,}|\d+_\{\d+\})(?![^,)\]⦄=&])",
     lambda match: f"'{match[0].lower()}'"), (r"(?<=[A-Za-z⟩])(?=\d)", ":"))]  # 3 to 5, 2 hours 30: parts in order
# What one of two answers may leave out, by the mark that shows it: a unit, or x=, f(x)=, (x,y)=, AB=, area=
OPTIONAL = {"⟨": "⟨(?![^⟩]*(?:illion|thousand|hundred|dozen|hal[fv]|than))[^⟩]*⟩",
            "=": r"(?<![^,])(?:(?:'\w{1,9}'|[A-Z]+|[a-zα-ω])(?:_{\w+})?(?:\(\w*\))?|\(\w(?:,\w)+\))="}
TOKEN = re.compile(r"'[^']*'|⟨[^⟩]*⟩|[\d.]+|\\(?:frac|root)|[A-Za-z]\(\w*\)(?==)|[A-Za-zα-ω∞∅](?:_\{\w+\})?|.")
# How tightly an operator binds: closing brackets not at all, up to RATIO they join parts, the others compute.
LEVELS = {symbol: level for level, row in enumerate(")]}⦄⟧ , ¶ & =≠<>≤≥ : +- */ ^".split()) for symbol in row}
RATIO, PRODUCT, POWER, ATOM, BRACKETS = 5, 7, 8, 9, {pair: pair for pair in "() [] (] [) {} ⦃⦄ ⟦⟧".split()}
OPERATIONS = {"+": lambda a, b: a - -b, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": operator.pow,
              r"\frac": operator.truediv, r"\root": lambda n, a: operate("^", a, 1 / n)}

def extract_boxed(text):
    r"""Content of the last \boxed{...}, \fbox{...} or \boxed 5; None without box, or if it is not closed. Ours."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0)
    box = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?![A-Za-z])([^\s{}$]+))").match(text, start)
    if not box or box[1]:
        return box and box[1]
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end(), box.end() + 20_000):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[box.end():brace.start()]

def normalize_answer(s):
    """One spelling for notations with one meaning: REWRITES in order; over MAX_CHARS only stripped. Ours."""
    for pattern, replacement in REWRITES if len(s) <= MAX_CHARS else ():
        s = pattern.sub(replacement, s)
    return s.strip()

def operate(sign, a, b):
    """Exact where it can be, and never large; roots are the principal ones, that of -8 is complex."""
    bits = [max(map(int.bit_length, n.as_integer_ratio())) if isinstance(n, Fraction) else 0 for n in (a, b)]
    if (bits[0] * abs(b) if sign == "^" else max(bits)) > MAX_BITS:
        raise OverflowError("too large")
    return OPERATIONS[sign](a, b)

def read(tokens, point, level=1):
    """Value at a point of the reversed tokens, as far as their operators bind at least as tightly as `level`."""
    token = tokens.pop()
    if token in "+-":
        value = Fraction(token + "1") * read(tokens, point, POWER)
    elif token in "([{⦃⟦":
        value, pair = read(tokens, point), BRACKETS[token + tokens.pop()]
        if isinstance(value, tuple) and value[0][0] == "," and pair != "⦃⦄":
            value = pair, value[1]
    elif token in OPERATIONS:  # \frac, \root
        value = operate(token, read(tokens, point, ATOM), read(tokens, point, ATOM))
    else:
        value = Fraction(token) if token[0] in ".0123456789" else point[token]
    while (binding := LEVELS.get(tokens[-1], PRODUCT)) >= level:
        if binding > RATIO:  # two values side by side are a product
            sign = tokens.pop() if tokens[-1] in LEVELS else "*"
            value = operate(sign, value, read(tokens, point, min(binding + 1, POWER)))
            continue
        kind, parts = "", [value]
        while LEVELS.get(tokens[-1]) == binding:
            kind += tokens.pop()
            parts.append(read(tokens, point, binding + 1))
        value = (kind[::-1].translate({62: "<", 8805: "≤"}), parts[::-1]) if not kind.strip(">≥") else (kind, parts)
    return value

def spell(value):
    """Equal values have one spelling: lists, sets and equations are sorted, roots and pi rounded to ten digits."""
    if isinstance(value, tuple):
        parts = [spell(part) for part in value[1]]
        return f"{value[0]}[{'; '.join(parts if value[0].strip(',=≠') else sorted(parts))}]"
    exact = value if isinstance(value, Fraction) else Fraction(value.real).limit_denominator(10_000)
    if value == exact or abs(value - exact) < 1e-13 * abs(value) < 1e-4:  # also (√2)^2, but 3.14159265358979 is not pi
        return str(exact)
    shift = 1000 * abs(value) * (1 + 1j)  # rounds away what is 0 but for rounding, as in √-4 = 1e-16 + 2i
    return f"{value + shift - shift:.10g}"

def read_answer(s):
    """Spelled values of a normalized answer at fixed points; None if it cannot be read: the check for golds. Ours."""
    tokens, values = TOKEN.findall(s if len(s) <= 2 * MAX_CHARS else ""), []
    names = sorted({token for token in tokens if re.match("['⟨A-Za-zα-ω∞∅]", token)} - {"e", "i", "π"})
    for turn in range(8):  # three points of integers, even and odd, then fractions of both signs
        point, stack = {"e": math.e, "i": 1j, "π": math.pi}, [")", *tokens[::-1]]
        for name in names:  # by its name alone: other names of the answer may cancel
            n = random.Random(f"{turn}{name}").randint(2, 20)
            sign = (-1) ** (ord(name[-2:][0]) >> max(0, turn - 3))  # of its letter, or its index: x_{1}
            point[name] = Fraction(2 * n + turn) if turn < 3 else Fraction(n * sign, 8)
        try:
            value = read(stack, point)
            values.append(None if len(stack) > 1 or (turn > 2 and "j" in repr(value)) else spell(value))
        except Exception:  # nothing a model writes may stop the training
            values.append(None)
    return values if values.count(None) < 6 else None

def is_equiv(a, b):
    """Whether two answers are equal. An unreadable one equals only the same string, an empty one nothing. Ours."""
    a, b = normalize_answer(a), normalize_answer(b)
    for mark, pattern in OPTIONAL.items():
        if (mark in a) != (mark in b) and len({*re.findall(pattern, f"{a},{b}")}) == 1:
            a, b = re.sub(pattern, "", a), re.sub(pattern, "", b)
    same = [x == y for x, y in zip(read_answer(a) or (), read_answer(b) or ()) if x and y]
    return a == b != "" or (len(same) > 2 and all(same))

def reward_fn(completion, answer):
    """1.0 if the last box equals the answer (or one of a list; each may be a text with a box), else 0.0. Ours."""
    golds = map(str, answer if isinstance(answer, (list, tuple, set)) else [answer])
    golds = [(extract_boxed(gold) or "") if re.search(r"\\(boxed|fbox)", gold) else gold for gold in golds]
    return float(any(is_equiv(extract_boxed(completion) or "", gold) for gold in golds))

# ------------------------------------------------------------------------------------------------------------- the tree
@dataclass(eq=False)
class Node:
    """One step: a segment of tokens that continues its parent's path. The root holds the prompt."""
    tokens: list                                         # this step's own token ids, EOS included
    parent: "Node | None" = field(default=None, repr=False)
    children: list = field(default_factory=list, repr=False)
    done: bool = False                                   # ended by an EOS
    reward: float = None                                 # of a leaf: the verifier's; else the mean of the children's
    advantage: float = 0.0
    entropies: list = field(default_factory=list, repr=False)  # nats, of the distribution each token was drawn from
    question: int = 0                                    # of a root: index of its prompt

    def path(self):
        """Nodes from the root to this one."""
        return (self.parent.path() if self.parent else []) + [self]

    def walk(self):
        """This node and all below it, depth-first, parents before children."""
        return [self, *(node for child in self.children for node in child.walk())]

    def leaves(self):
        return [node for node in self.walk() if not node.children]

    depth = property(lambda self: len(self.path()) - 1)
    trained = property(lambda self: abs(self.advantage) > 1e-12)  # its tokens are in the loss; 1e-12 is rounding

def path_text(node, tokenizer):
    """Text of the completion up to the end of this node. Of a leaf: what the verifier grades."""
    ids = [token for step in node.path()[1:] for token in step.tokens]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if node.children else text  # half a UTF-8 character is left to the child that ends it

def step_text(node, tokenizer):
    """The node's own piece of text: the pieces of a path concatenate to its leaf's path_text."""
    return path_text(node, tokenizer)[len(path_text(node.parent, tokenizer)):] if node.parent else ""

def render_tree(node, tokenizer, indent=""):
    """Indented lines of reward, advantage, text; control characters escaped, so that a terminal obeys none."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in step_text(node, tokenizer))
    lines = [f"{indent}{node.reward:.2f} {node.advantage:+.2f} | {text}"]
    return "\n".join(lines + [render_tree(child, tokenizer, indent + "    ") for child in node.children])

# -------------------------------------------------------------------------------------------------------- tree sampling
# How to sample: exactly softmax(logits / temperature) over the tokenizer's ids; temperature 0 is greedy. eos_ids: each
# ends a rollout; ids from n_tokens on only pad the embedding matrix; max_rows: sequences of one generate call.
Decoding = namedtuple("Decoding", "eos_ids n_tokens temperature max_rows", defaults=(1.0, 512))

def prefill(model, sequences, pad_id):
    """R token lists -> state: (ids [R, T] left-padded, mask [R, T], KV cache of the first T - 1 positions). The last
    token stays out: `generate` feeds it itself; given a cache of all T it would feed the whole prompt again."""
    model.eval()  # in train mode, gradient checkpointing drops the cache without a word
    length = max(2, *map(len, sequences))  # at least one column for the cache
    ids = torch.tensor([[pad_id] * (length - len(s)) + s for s in sequences], device=model.device)
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences], device=model.device)
    cache, positions = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0)
    model.get_decoder()(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    return ids, mask, cache

def select_rows(state, rows):
    """A new state of these rows: repeats a parent for each child and drops finished rows in one copy."""
    ids, mask, cache = state
    rows = torch.tensor(rows, device=ids.device)
    return ids[rows], mask[rows], DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])

def generate_step(model, state, max_new_tokens, decoding):
    """Continue every row by one step with HF generate. -> ([R] (tokens, done, entropies), state after the step)."""
    (ids, mask, cache), eos, drawn, entropies = state, [*decoding.eos_ids], decoding.temperature > 0, []
    def on_policy(_, scores):  # the only logits processor
        scores[:, decoding.n_tokens:] = -math.inf
        scores = scores / (decoding.temperature or 1.0)
        entropies.append(torch.special.entr(scores.softmax(-1)).sum(-1))  # H = -sum_a pi(a) log pi(a)
        return scores
    # a clean config on the model too: what is unset here would come from the checkpoint's own (penalties, top_k, ...)
    clean = GenerationConfig(do_sample=drawn, temperature=1.0, top_k=0 if drawn else 50, top_p=1.0, use_cache=True,
                             max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos[0])
    original, model.generation_config = model.generation_config, clean
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, logits_processor=[on_policy])
    model.generation_config = original
    new, steps = out[:, ids.shape[1]:], []
    for tokens, h in zip(new.tolist(), torch.stack(entropies, 1).tolist()):
        n = next((i for i, token in enumerate(tokens, 1) if token in eos), None)  # behind its first EOS is padding
        steps.append((tokens[:n], n is not None, h[:n]))
    return steps, (out, torch.cat([mask, torch.ones_like(new)], 1), cache)

def add_child(parent, tokens, done, entropies):
    parent.children.append(Node(tokens, parent, done=done, entropies=entropies))
    return parent.children[-1]

def grow(model, nodes, rows, state, branching, step_lens, decoding):
    """Give every node its children, level by level; nodes[i] lives in row rows[i] of state. A frontier wider than
    max_rows is walked depth-first in chunks: the same distribution in less memory."""
    wanted = [i for i in range(len(nodes)) for _ in range(branching[0])]
    for start in range(0, len(wanted), decoding.max_rows):
        chunk = wanted[start:start + decoding.max_rows]
        steps, child_state = generate_step(model, select_rows(state, [rows[i] for i in chunk]), step_lens[0], decoding)
        children = [add_child(nodes[i], *step) for i, step in zip(chunk, steps)]
        live = [row for row, child in enumerate(children) if not child.done]
        if live and branching[1:]:
            grow(model, [children[row] for row in live], live, child_state, branching[1:], step_lens[1:], decoding)

@torch.no_grad()
def sample_trees(model, prompts, branching, step_lens, decoding):
    """TreeRPO's sampler: one tree per prompt (a list of ids), branching[d] children of up to step_lens[d] tokens below
    each live node of depth d. -> roots, in the order of the prompts."""
    roots = [Node(list(prompt), question=i) for i, prompt in enumerate(prompts)]
    by_length, width = sorted(roots, key=lambda root: len(root.tokens)), max(1, decoding.max_rows // branching[0])
    for start in range(0, len(roots), width):  # prompts of about one length together: little padding
        group = by_length[start:start + width]
        state = prefill(model, [root.tokens for root in group], decoding.eos_ids[0])
        grow(model, group, range(len(group)), state, branching, step_lens, decoding)
    return roots

@torch.no_grad()
def sample_forests(model, prompts, leaves, trees, budget, threshold, decoding):
    """TreeAdv's sampler: `trees` first rollouts a prompt, then forks where they were uncertain; `leaves` rollouts in
    all, of up to `budget` tokens. Forks: the positions of highest entropy above threshold (nats), one round of them
    [ours]; where there are too few, fresh rollouts fill up. -> roots, one a tree, grouped by prompt."""
    roots, forks = [], []  # forks: (node to continue, the tokens that may take)
    for first in sample_trees(model, prompts, [trees], [budget], decoding):
        spots = [(h, k, t) for k, step in enumerate(first.children) for t, h in enumerate(step.entropies)]
        spots = sorted((spot for spot in spots if spot[0] > threshold), reverse=True)[:leaves - trees]
        forest = [Node(first.tokens, question=first.question) for _ in range(leaves - len(spots))]
        for k, (node, rollout) in enumerate(zip(forest, first.children)):  # cut the rollout at its forks
            cuts = sorted(t for _, j, t in spots if j == k)
            for start, end in zip([0, *cuts], [*cuts, len(rollout.tokens)]):
                if end > start:
                    node = add_child(node, rollout.tokens[start:end], False, rollout.entropies[start:end])
                forks += [(node, budget - end)] if end < len(rollout.tokens) else []
            node.done = rollout.done
        forks += [(root, budget) for root in forest[trees:]]
        roots += forest
    prefixes = [[token for step in node.path() for token in step.tokens] for node, _ in forks]
    for (node, n), fork in zip(forks, sample_trees(model, prefixes, [1], [budget], decoding)):
        rest = fork.children[0]
        add_child(node, rest.tokens[:n], rest.done and len(rest.tokens) <= n, rest.entropies[:n])
    return roots

# -------------------------------------------------------------------------------------------------------- reward backup
def backup_rewards(node):
    """Fill node.reward from the leaves up, return it. A leaf keeps its own; an inner node takes the mean of its
    children's (the paper's rule), which is not the mean of its leaves where a branch ended early."""
    if node.children:
        node.reward = fmean(backup_rewards(child) for child in node.children)
    return node.reward

# ---------------------------------------------------------------------------------------- step-level groups, advantages
def group_relative_advantages(rewards, normalizer, min_group_std=0.0):
    """Rewards [n] of one group -> advantages [n], float64, sum 0; all 0 if their population std is at most
    min_group_std [ours]. std: (r - mu) / population std; none: r - mu; bernoulli, r in [0, 1]: (r - mu) /
    sqrt(mu (1 - mu)) [ours: std for 0/1 rewards, but near-ties stay small]. Raises ValueError."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    mu, std = rewards.mean(), rewards.std(correction=0)
    if std <= max(min_group_std, 1e-9):  # 1e-9: equal but for rounding
        return torch.zeros_like(rewards)
    if normalizer == "bernoulli" and (rewards.min() < 0 or rewards.max() > 1):
        raise ValueError("the bernoulli normaliser needs rewards in [0, 1]")
    return (rewards - mu) / {"bernoulli": (mu * (1 - mu)).sqrt(), "std": std, "none": 1.0}[normalizer]

def add_sibling_advantages(forest, normalizer, min_group_std=0.0):
    """TreeRPO's step-level groups: node.advantage += its advantage among its siblings. -> has each group a signal?"""
    signals = []
    for siblings in (node.children for root in forest for node in root.walk() if node.children):
        group = group_relative_advantages([node.reward for node in siblings], normalizer, min_group_std)
        for node, advantage in zip(siblings, group.tolist()):
            node.advantage += advantage
        signals.append(bool(group.any()))
    return signals

def add_leaf_advantages(forest, normalizer, min_group_std=0.0):
    """TreeAdv: compare all leaves of a question; node.advantage += the plain mean [ours] over the leaves below it."""
    leaves = [leaf for root in forest for leaf in root.leaves()]
    group = group_relative_advantages([leaf.reward for leaf in leaves], normalizer, min_group_std)
    own = dict(zip(leaves, group.tolist()))
    for node in (node for root in forest for node in root.walk() if node.parent):
        node.advantage += fmean(own[leaf] for leaf in node.leaves())
    return [bool(group.any())]

ADVANTAGES = {"siblings": [add_sibling_advantages], "leaves": [add_leaf_advantages],
              "both": [add_sibling_advantages, add_leaf_advantages]}

def unit_weights(nodes, level_weight, ratio):
    """{depth: loss weight of a unit there}; a unit is a token, or a step under sequence ratios. The weights of all
    sampled units, trained or not, sum to 1, so that pruning, packs and micro-batches do not change the gradient.
    tokens: every unit alike. levels: every depth alike in sum [ours]."""
    units = Counter(d for node in nodes for d in [node.depth] * (len(node.tokens) if ratio == "token" else 1))
    return {d: 1 / (units.total() if level_weight == "tokens" else len(units) * n) for d, n in units.items()}

# -------------------------------------------------------------------------------------------- packed log-probs and loss
def pack_nodes(roots, pack_len):
    """Put every trained node into a pack once, behind its ancestors. -> packs, each {node: is it scored here?}. A pack
    holds at most pack_len tokens, unless one path is longer. Depth-first order keeps siblings together, so that an
    ancestor is seldom computed again; where it is, it is context only."""
    packs = [{}]
    for node in (node for root in roots for node in root.walk() if node.trained):
        joined = packs[-1] | {step: False for step in node.path() if step not in packs[-1]}
        if packs[-1] and sum(len(step.tokens) for step in joined) > pack_len:
            packs.append({})
            joined = dict.fromkeys(node.path(), False)
        packs[-1] = joined | {node: True}
    return packs

def pack_tensors(pack, device):
    """A pack -> one row of T tokens, of which M in S steps are scored. ids, positions [1, T]; mask [1, 1, T, T], True
    where a token may look: itself, earlier tokens of its step, ancestors; predictors [M]: the column whose output
    predicts a scored token; targets [M]: that token; segments [M]: its step, < S."""
    ids, positions, owner, predictors, targets, segments, last = [], [], [], [], [], [], {}
    for k, (node, scored) in enumerate(pack.items()):
        start, end = len(ids), len(ids) + len(node.tokens)
        offset = positions[last[node.parent]] + 1 if node.parent else 0
        if scored:
            predictors += [last[node.parent], *range(start, end - 1)]
            targets += node.tokens
            segments += [segments[-1] + 1 if segments else 0] * len(node.tokens)
        last[node] = end - 1  # its last column
        ids += node.tokens
        positions += range(offset, offset + end - start)
        owner += [k] * (end - start)
    related = torch.tensor([[step in path for step in pack] for path in (set(node.path()) for node in pack)])
    row = dict(ids=[ids], positions=[positions], predictors=predictors, targets=targets, segments=segments,
               mask=related[owner][:, owner].tril()[None, None])
    return argparse.Namespace(**{name: torch.as_tensor(value, device=device) for name, value in row.items()})

def token_logps(model, row, temperature, n_tokens, chunk=256, keep=2**22):
    """Log-probs [M], float32, of the scored tokens under softmax(logits / temperature) over the first n_tokens ids. The
    head runs in chunks, and, if there are over `keep` logits in all, again in the backward pass: never more than
    chunk x vocabulary float32 logits at once."""
    out = model.get_decoder()(row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False)
    hidden = out.last_hidden_state[0, row.predictors]
    def score(hidden, targets):
        logits = model.get_output_embeddings()(hidden)[:, :n_tokens].float() / temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    again = len(hidden) * n_tokens > keep
    return torch.cat([torch.utils.checkpoint.checkpoint(score, h, y, use_reentrant=False) if again else score(h, y)
                      for h, y in zip(hidden.split(chunk), row.targets.split(chunk))])

def policy_loss(logps, old_logps, segments, advantages, weights, clip_eps, ratio):
    """PPO's clipped loss -sum_u w_u min(r_u A_u, clip(r_u, 1 - eps, 1 + eps) A_u) -> (loss, clipped units, units).
    logps, old_logps, segments [M]; advantages, weights [S]. token (GRPO): a unit is a token, r = pi / pi_old.
    sequence (GSPO, 2507.18071): a unit is a step, r = (pi(y) / pi_old(y))^(1 / |y|) = exp(mean_t log r_t)."""
    log_ratio = logps - old_logps
    if ratio == "sequence":
        sums = torch.zeros_like(weights).index_add(0, segments, log_ratio)
        log_ratio = sums / torch.bincount(segments)
    else:
        advantages, weights = advantages[segments], weights[segments]
    r = log_ratio.exp()
    plain, clipped = r * advantages, r.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -(weights * torch.min(plain, clipped)).sum(), (clipped < plain).sum().item(), len(r)

# --------------------------------------------------------------------------------------------------------------- update
def update_policy(model, optimizer, trees, weights, decoding, autocast, pack_len, clip_eps, ratio, updates):
    """`updates` optimiser steps on one batch of trees -> grad_norm and clip_ratio of the last, skipped. weights: see
    unit_weights. Old log-probs are those of the first pass, before any step: with one pass every ratio is 1. A pass
    whose loss or gradient is not finite never reaches the weights: skipped."""
    packs, old_logps, metrics = pack_nodes(trees, pack_len), {}, dict(grad_norm=0.0, clip_ratio=0.0, skipped=False)
    model.train(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))  # works in train mode only
    for _ in range(updates if packs[0] else 0):
        sums = torch.zeros(3)  # loss, clipped units, units
        for k, pack in enumerate(packs):
            row, scored = pack_tensors(pack, model.device), [node for node in pack if pack[node]]
            per_step = torch.tensor([[node.advantage, weights[node.depth]] for node in scored], device=model.device)
            with autocast:
                logps = token_logps(model, row, decoding.temperature, decoding.n_tokens)
            old = old_logps.setdefault(k, logps.detach())
            loss, *counts = policy_loss(logps, old, row.segments, *per_step.T, clip_eps, ratio)
            loss.backward()
            sums += torch.tensor([loss.item(), *counts])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        finite = math.isfinite(sums[0] + norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics = dict(grad_norm=norm if finite else None, clip_ratio=(sums[1] / sums[2]).item(),
                       skipped=metrics["skipped"] or not finite)
    return metrics

def grade(trees, questions, tokenizer):
    """Fill the reward of every leaf by the verifier. -> (leaves, their texts)."""
    leaves = [leaf for root in trees for leaf in root.leaves()]
    texts = [path_text(leaf, tokenizer) for leaf in leaves]
    for leaf, text in zip(leaves, texts):
        leaf.reward = reward_fn(text, questions[leaf.path()[0].question]["answer"])
    return leaves, texts

def evaluate(model, tokenizer, questions, samples, budget, decoding, seed):
    """Held-out accuracy, avg@samples at temperature 1 and greedy, on a random stream of its own."""
    accuracy, prompts = {}, [q["prompt"] for q in questions]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, width, temperature in (("eval/accuracy", samples, 1.0), ("eval/greedy_accuracy", 1, 0.0)):
            trees = sample_trees(model, prompts, [width], [budget], decoding._replace(temperature=temperature))
            leaves, _ = grade(trees, questions, tokenizer)
            accuracy[name] = fmean(leaf.reward for leaf in leaves)
    return accuracy

# ------------------------------------------------------------------------------------------ model, checkpoint and log
def from_pretrained(kind, name, **options):
    """kind.from_pretrained(name) for a folder, hub or cache. Raises BadInput."""
    try:
        os.path.isdir(name) or use_hub_or_cache()
        return kind.from_pretrained(name, **options)
    except Exception as e:  # a dozen unrelated types say that a file is missing, torn or of another model
        raise BadInput(f"--model {name}: cannot load it ({e!s:.300}); give a folder with config, weights, tokenizer, "
                       "or a hub id that is reachable or in the local cache") from e

def load_model(name, device="auto", dtype="auto", grad_checkpointing=False):
    """-> (model to train, model to sample from, tokenizer); mixed: the second is a bf16 copy. Raises BadInput."""
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    tokenizer = from_pretrained(AutoTokenizer, name)
    load = lambda dtype: from_pretrained(AutoModelForCausalLM, name, dtype=dtype, attn_implementation="sdpa").to(device)
    model = sampler = load(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    require(tokenizer.encode("1"), f"--model {name}: its tokenizer knows no words; is tokenizer.json missing?")
    require(tokenizer.eos_token_id is not None, f"--model {name}: no EOS; set eos_token in its tokenizer_config.json")
    kinds = {model.config.model_type, *(getattr(model.config, "layer_types", None) or [])} - {"full_attention"}
    require(kinds < {"qwen2", "qwen3", "llama"}, f"--model {name}: {', '.join(sorted(kinds))} is not supported, only "
            "qwen2, qwen3 and llama models with full attention in every layer are tested")
    if dtype == "mixed" or dtype == "auto" and device == "cuda":
        sampler = load(torch.bfloat16)  # rotary frequencies stay float32
    if grad_checkpointing:  # renamed in transformers 5.23
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, sampler, tokenizer

def make_decoding(model, tokenizer, temperature, max_rows):
    """Stop at the EOS ids of model, generation config and tokenizer, and at the end of a chat turn."""
    vocabulary = tokenizer.get_vocab()
    stops = [model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id]
    stops = sum((eos if isinstance(eos, list) else [eos] for eos in stops), [vocabulary.get("<|im_end|>")])
    n_tokens = min(max(vocabulary.values()) + 1, model.config.vocab_size)
    return Decoding(tuple(sorted({*stops} - {None})), n_tokens, temperature, max_rows)

def append_jsonl(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

def tree_rows(trees, batch, step, tokenizer):
    """Every node as a dict for --dump-trees; ids count through the step, a root's tokens are the prompt."""
    nodes = [(tree, batch[root.question], node) for tree, root in enumerate(trees) for node in root.walk()]
    ids, names = {node: i for i, (*_, node) in enumerate(nodes)}, "depth tokens done reward advantage trained".split()
    return [dict(step=step, question_id=q["id"], answer=q["answer"], tree=tree, id=i, parent=ids.get(node.parent),
                 text=step_text(node, tokenizer), **{name: getattr(node, name) for name in names})
            for i, (tree, q, node) in enumerate(nodes)]

def checkpoints(out):
    """Checkpoint folders of a run, oldest first."""
    return sorted((p for p in Path(out).glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))

def manifest(folder):
    """Name and size of every file, to know a damaged checkpoint by."""
    return {f"{p.stat().st_size} {p.name}" for p in folder.iterdir() if p.name != "manifest.txt"}

def newest_checkpoint(out):
    """The newest whole checkpoint folder of a run, None if there is none; damaged ones are named."""
    for folder in reversed(checkpoints(out)):
        saved = folder / "manifest.txt"
        if saved.exists() and {*saved.read_text("utf-8", "replace").split("\n")} <= manifest(folder):
            return folder
        print(f"{folder} is damaged: a file is missing or has another size than when it was saved", file=sys.stderr)

def save_checkpoint(out, model, tokenizer, optimizer, last, keep):
    """OUT/checkpoint-STEP: a plain Hugging Face folder plus trainer_state.pt, written aside and then renamed, so that a
    kill or a full disk leaves the earlier ones whole. last: the newest metrics, with the step. Raises OSError."""
    final, aside = Path(out) / f"checkpoint-{last['step']}", Path(out) / "checkpoint.tmp"
    for folder in (aside, final):  # left by a kill; damaged
        shutil.rmtree(folder, ignore_errors=True)
    rng = dict(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        torch.save(dict(optimizer=optimizer.state_dict(), last=last, **rng), aside / "trainer_state.pt")
        (aside / "manifest.txt").write_text("\n".join(sorted(manifest(aside))))
        aside.rename(final)
    except Exception as e:  # torch and safetensors have types of their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"cannot write {final}: {e}. Earlier checkpoints are intact") from e
    for old in [p for p in checkpoints(out) if int(p.name[11:]) <= last["step"]][:-keep]:  # later ones: damaged
        shutil.rmtree(old.rename(aside))  # renamed first: no half-deleted folder looks like a checkpoint

# --------------------------------------------------------------------------------------------------------------- main
ALGOS = dict(grpo={}, gspo=dict(ratio="sequence", clip_eps=4e-4), treeadv=dict(branch_at="entropy", advantage="leaves"))
# What a resumed run may change: it decides what fits and what is shown, not what is learned.
MAY_CHANGE = "steps max_rows pack_len grad_checkpointing save_every keep print_tree resume".split()
SHOWN = "step reward eval/accuracy tok_per_s eval/greedy_accuracy completions/mean_length skipped".split()  # on screen

def parse_args(argv):
    """Command line -> namespace of all flags: those given, else those of the resumed run, else the table's defaults."""
    parser = argparse.ArgumentParser(None, "treerpo.py [flags]", __doc__, formatter_class=argparse.RawTextHelpFormatter)
    hub, demo = {}, {}
    for flag, kind, default, own in re.findall(r"^  (--\S+) +(\S+) +(\S+) +(\S+)", __doc__, re.M):
        read, many = dict(int=int, ints=int, float=float).get(kind, str), kind == "ints"
        how = dict(type=read, nargs="+" if many else None, choices=kind.split("|") if "|" in kind else None)
        how = how if kind != "flag" else dict(action="store_true")
        name = parser.add_argument(flag, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **how).dest
        for table, text in (hub, default), (demo, default if own == "=" else own.replace("demo/", f"{HERE}/demo/")):
            table[name] = None if text == "-" else [*map(read, text.split(","))] if many else read(text)
    given = vars(parser.parse_args(argv))
    args, algo = hub if "model" in given else demo, given.get("algo", "treerpo")
    args |= ALGOS.get(algo, {})
    if algo != "treerpo" or given.get("branch_at") == "entropy" or len(given.get("branching", "12")) == 1:
        args |= dict(branching=[args["leaves"]], step_len=[args["step_len"][0] * len(args["branching"])])  # one level
    args |= dict(eval_data=None) if "data" in given else {}
    if "resume" in given:
        try:
            saved = json.loads(Path(given["resume"], "config.json").read_bytes())
            args = {name: saved[name] for name in hub} | {"out": given["resume"]}
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise BadInput(f"--resume {given['resume']}: no run's output folder ({e!r:.90}); give an --out") from e
        other = [name for name in given if given[name] != args[name] and name not in MAY_CHANGE]
        other += ["steps"] if given.get("steps", math.inf) < args["steps"] else []
        require(not other, f"--resume: that run has another --{' --'.join(other).replace('_', '-')}; leave it out")
    args = argparse.Namespace(**args | given)
    one_level = args.algo in ("grpo", "gspo") or args.branch_at == "entropy"
    require(not one_level or len(args.branching) == 1, "--branching: grpo, gspo and entropy branching take one number")
    require(len(args.step_len) in (1, len(args.branching)), "--step-len: give one number, or one for each --branching")
    require(args.trees <= args.leaves, "--trees must be at most --leaves")
    require(0 <= args.min_group_std < math.inf, "--min-group-std must be 0 or more")
    for name, value in vars(args).items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) in (int, float)]
        fine = name in ("seed", "min_group_std") or all(0 < n < math.inf for n in numbers)
        require(fine, f"--{name.replace('_', '-')}: {value} must be above zero")
    require(abs(args.seed) < 2**63, f"--seed {args.seed} has more than 63 bits")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no CUDA GPU; use --device cpu")
    return args

def open_run(args):
    """-> (output folder, its newest checkpoint if resumed). Raises BadInput if it is taken or cannot be written."""
    out = Path(args.out or f"runs/{args.algo}-{time.strftime('%Y%m%d-%H%M%S')}")
    require(args.resume or not (out / "config.json").exists(), f"--out {out}: it holds a run; continue it by --resume")
    try:
        out.mkdir(parents=True, exist_ok=bool(args.out))  # of two runs begun in one second the later one is refused
        (out / "config.tmp").write_text(json.dumps({**vars(args), "out": str(out), "resume": None}, indent=1))
        open(args.dump_trees or os.devnull, "a").close()
    except OSError as e:
        raise BadInput(f"--out or --dump-trees: cannot write there ({e})") from e
    resumed = newest_checkpoint(out) if args.resume else None
    require(resumed or not checkpoints(out), f"--resume {out}: no whole checkpoint is left; start in another --out")
    return out, resumed

def batch_of(questions, step, size, seed):
    """The questions of this step. Each epoch has its own order, from the seed alone: a resumed run needs no state."""
    n, places = len(questions), range((step - 1) * size, step * size)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in {k // n for k in places}}
    return [questions[orders[k // n][k % n]] for k in places]

def train_step(model, sampler, tokenizer, optimizer, batch, decoding, step_lens, args):
    """The algorithm of the module docstring on one batch of questions -> (metrics, trees)."""
    start, prompts, signals = time.perf_counter(), [q["prompt"] for q in batch], []
    if args.branch_at == "fixed":                                                                         # 1. grow
        trees = sample_trees(sampler, prompts, args.branching, step_lens, decoding)
    else:
        trees = sample_forests(sampler, prompts, args.leaves, args.trees, *step_lens, args.entropy_threshold, decoding)
    grown = time.perf_counter()
    leaves, texts = grade(trees, batch, tokenizer)                                                        # 2. verify
    verified = time.perf_counter()
    reward = fmean(map(backup_rewards, trees))                                                            # 3. back up
    for question in range(len(batch)):                                                                    # 4. compare
        forest = [root for root in trees if root.question == question]
        for add_advantages in ADVANTAGES[args.advantage]:
            signals += add_advantages(forest, args.normalizer, args.min_group_std)
    nodes = [node for root in trees for node in root.walk() if node.parent]
    weights = unit_weights(nodes, args.level_weight, args.ratio)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=sampler is not model)
    update = update_policy(model, optimizer, trees, weights, decoding, autocast, args.pack_len, args.clip_eps,
                           args.ratio, args.updates_per_batch)                                            # 5. update
    sampler.load_state_dict(model.state_dict())  # a bf16 copy follows the trained weights, rounded
    end, tokens = time.perf_counter(), sum(len(node.tokens) for node in nodes)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"reward": reward, "frac_reward_zero_std": 1 - fmean(signals), "tokens_sampled": tokens,
            "completions/mean_length": fmean(sum(len(n.tokens) for n in leaf.path()[1:]) for leaf in leaves),
            "completions/clipped_ratio": fmean(not leaf.done for leaf in leaves),
            "no_answer_ratio": fmean(extract_boxed(text) is None for text in texts),
            "entropy": fmean(h for node in nodes for h in node.entropies), "tok_per_s": tokens / (end - start),
            "time_sample": grown - start, "time_score": verified - grown, "time_update": end - verified,
            "peak_mem_gb": (torch.cuda.max_memory_allocated() or resident) / 1e9, **update}, trees

def train(args):
    """A whole run: load, then step by step train, evaluate, log and save. -> exit status."""
    columns, _ = (args.question_column, args.answer_column), from_pretrained(AutoTokenizer, args.model)  # fails early
    questions = load_questions(args.data, *columns)
    held_out = load_questions(args.eval_data, *columns) if args.eval_data else questions[::5]
    questions = questions if args.eval_data else [q for i, q in enumerate(questions) if i % 5] or questions
    out, resumed = open_run(args)
    model, sampler, tokenizer = load_model(str(resumed or args.model), args.device, args.dtype, args.grad_checkpointing)
    decoding = make_decoding(model, tokenizer, args.temperature, args.max_rows)
    step_lens = (args.step_len * len(args.branching))[:len(args.branching)]
    fit = load_template(args.template, tokenizer), tokenizer, sum(step_lens), model.config.max_position_embeddings
    questions = fit_context(questions, args.data, *fit)
    held_out = fit_context(held_out[:args.eval_questions], "held-out questions", *fit)
    fused = model.device.type == "cuda"  # no second copy of the weights while it steps
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    torch.manual_seed(args.seed)
    logs = [out / "metrics.jsonl", *filter(None, [args.dump_trees])]
    last = dict(step=-1, tokens_sampled=0, skipped=0, log_sizes=[0, 0])  # the newest metrics
    if resumed:
        state = torch.load(resumed / "trainer_state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        last = state["last"]
    for path, size in zip(logs, last["log_sizes"]):  # a kill may have left lines of later steps, or half a line
        with open(path, "ab") as file:
            file.truncate(min(size, file.tell()))
    (out / "config.tmp").rename(out / "config.json")

    stops = []  # the first Ctrl-C ends the run after this step, the second one at once
    signal.signal(signal.SIGINT, lambda number, _: stops.append(signal.signal(number, signal.default_int_handler)))
    print(f"{out}: {max(0, last['step'])} steps done; Ctrl-C finishes a step and saves, Ctrl-C twice stops at once")
    for step in (bar := tqdm(range(last["step"] + 1, args.steps + 1), desc=args.algo)):
        row = {"step": step}
        if step:  # step 0 is the evaluation before training
            batch = batch_of(questions, step, args.questions_per_step, args.seed)
            optimizer.param_groups[0]["lr"] = row["lr"] = args.lr * min(1.0, step / 5)
            metrics, trees = train_step(model, sampler, tokenizer, optimizer, batch, decoding, step_lens, args)
            row |= metrics | dict(skipped=(last["skipped"] + 1) * metrics["skipped"], questions_seen=step * len(batch),
                                  tokens_sampled=last["tokens_sampled"] + metrics["tokens_sampled"])
            row |= dict(skipped_questions=[q["id"] for q in batch]) if row["skipped"] else {}
            if args.dump_trees:
                append_jsonl(args.dump_trees, tree_rows(trees, batch, step, tokenizer))
            if args.print_tree:
                tqdm.write(render_tree(trees[0], tokenizer))
        if step % args.eval_every == 0 or step == args.steps:
            row |= evaluate(sampler, tokenizer, held_out, args.eval_samples, sum(step_lens), decoding, args.seed)
        append_jsonl(logs[0], [row])
        last |= row | dict(log_sizes=[os.path.getsize(path) for path in logs])
        tqdm.write(", ".join(f"{name} {round(row[name], 3):,}" for name in SHOWN if name in row))
        bar.set_postfix({name: last[name] for name in SHOWN[1:4] if name in last})
        if step and (step % args.save_every == 0 or step == args.steps or stops or last["skipped"] >= 3):
            save_checkpoint(out, model, tokenizer, optimizer, last, args.keep)
        if last["skipped"] >= 3:
            raise FloatingPointError(f"three steps in a row were not finite; {out}/checkpoint-{step} has the weights "
                                     "before them: start from it in a new --out, with a lower --lr")
        if stops:
            print(f"stopped after step {step}; continue with: python treerpo.py --resume {out}")
            return 130
    return 0

def main(argv=None):
    try:
        args = parse_args(argv)
        return train(args)
    except BadInput as e:
        print(f"treerpo.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError) as e:
        if "memory" in f"{type(e).__name__} {e}".lower():
            e.add_note(f"Out of memory: lower --max-rows (now {args.max_rows}) or --pack-len (now {args.pack_len}), or "
                       "add --grad-checkpointing; then continue from the last checkpoint with --resume")
        raise

if __name__ == "__main__":
    sys.exit(main())
