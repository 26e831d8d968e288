"""Captions as PixArt was trained to read them: without markup, links, handles, numbers of articles and shop talk."""

from __future__ import annotations

import html
import re
import unicodedata
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_SITE = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_IMAGE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
# Unicode's dash punctuation
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rules = list[tuple[re.Pattern[str], str]]


def _rules(*rules: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
_SIGNS = _rules(
    (r"@\w+", ""),  # handles
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and what lies around them in Unicode
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # internet addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_IMAGE}", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")
_QUOTES = _rules(("[\u201e\u201f]", '"'), ("[\u02bc\u201a\u201b]", "'"))
_WIDTHS_AND_LIGATURES = re.compile("[\u3000\uff01-\uffef\ufb00-\ufb06]+")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # codes: ab1234
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # ab12cd
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 12ab34
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_IMAGE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # a1b2c
    ("\\b\\d+\\.?\\d*[x\u0445×]\\d+\\.?\\d*\\b", ""),  # sizes: 12x34, with a Cyrillic x too
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotes around all
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """The caption in lower case without what PixArt's training took out of captions, in one pass.

    PixArt cleans every caption twice, for one pass may uncover what the next takes away. The rules and their order are
    those of the reference, down to the odd ones: of a link to none of the listed top domains only the scheme goes.

    The reference parses markup with BeautifulSoup, to the same text, and mends the rest with ftfy. Of that, ligatures,
    full-width forms, low quotation marks and the composition of accents are done here by the standard library, while
    text that was decoded with the wrong encoding ("schÃ¶n") and control characters stay as they are.

    Source: DeepFloyd/IF `deepfloyd_if/modules/t5.py`, by way of PixArt-alpha/PixArt-alpha `diffusion/model/t5.py`.
    """
    caption = _apply(_LINKS, unquote_plus(caption).strip().lower())
    caption = _apply(_SIGNS, _without_markup(caption))
    if len(_JOINTS.findall(caption)) > 3:  # this-is-one-long-name
        caption = _JOINTS.sub(" ", caption)
    caption = _WIDTHS_AND_LIGATURES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), caption)
    caption = unicodedata.normalize("NFC", _apply(_QUOTES, caption))
    return _apply(_WORDS, html.unescape(html.unescape(caption))).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    reader = _MarkupReader(convert_charrefs=False)
    reader.feed(text)
    reader.close()
    return "".join(reader.text)


class _MarkupReader(HTMLParser):
    """Collects what a page shows: no tags, no comments, nothing inside of scripts, styles, templates and ruby."""

    HIDDEN = frozenset({"script", "style", "template", "rt", "rp"})

    def __init__(self, *, convert_charrefs: bool) -> None:
        super().__init__(convert_charrefs=convert_charrefs)
        self.text: list[str] = []
        self.hidden_in: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self.hidden_in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden_in:
            del self.hidden_in[self.hidden_in.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.hidden_in:
            self.text.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.startswith("cdata["):  # shown wherever it stands
            self.text.append(data[6:])

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))
