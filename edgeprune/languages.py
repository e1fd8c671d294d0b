# ruff: noqa: RUF001 (letters of many alphabets)
"""Which letters a language is written with, and a short text in several of them.

There is no corpus on board. What can be said honestly without one is whether a token can occur in a language
at all: by its script, and where many languages share the Latin or Cyrillic script by the alphabet.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.errors import ConfigError
from edgeprune.registry import suggest


@dataclass(frozen=True, slots=True)
class Language:
    """`letters` are those of a shared script, beside a to z where the script is Latin."""

    scripts: tuple[str, ...]  # first word of a letter's Unicode name
    letters: str = ""


def _latin(letters: str = "") -> Language:
    return Language(("LATIN",), letters)


_RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
LANGUAGES: Mapping[str, Language] = {
    "en": _latin(),
    "de": _latin("äöüßẞ"),
    "fr": _latin("àâæçéèêëîïôœùûüÿ"),
    "es": _latin("áéíñóúüªº"),
    "pt": _latin("àáâãçéêíóôõúüªº"),
    "it": _latin("àèéìíîòóùúªº"),
    "ca": _latin("àçèéíïòóúü"),
    "nl": _latin("áéëèíïóöúüĳ"),
    "da": _latin("æøåéó"),
    "no": _latin("æøåéòóôèê"),
    "sv": _latin("åäöéà"),
    "fi": _latin("äöåšž"),
    "is": _latin("áðéíóúýþæö"),
    "pl": _latin("ąćęłńóśźż"),
    "cs": _latin("áčďéěíňóřšťúůýž"),
    "sk": _latin("áäčďéíĺľňóôŕšťúýž"),
    "sl": _latin("čšž"),
    "hr": _latin("čćđšž"),
    "hu": _latin("áéíóöőúüű"),
    "ro": _latin("ăâîșțşţ"),
    "et": _latin("äõöüšž"),
    "lv": _latin("āčēģīķļņšūž"),
    "lt": _latin("ąčęėįšųūž"),
    "tr": _latin("çğıİöşüâîû"),
    "vi": _latin("àáảãạăằắẳẵặâầấẩẫậđèéẻẽẹêềếểễệìíỉĩịòóỏõọôồốổỗộơờớởỡợùúủũụưừứửữựỳýỷỹỵ"),
    "id": _latin(),
    "ms": _latin(),
    "sw": _latin(),
    "ru": Language(("CYRILLIC",), _RUSSIAN),
    "uk": Language(("CYRILLIC",), "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя"),
    "be": Language(("CYRILLIC",), "абвгдеёжзійклмнопрстуўфхцчшыьэюя"),
    "bg": Language(("CYRILLIC",), "абвгдежзийклмнопрстуфхцчшщъьюя"),
    "sr": Language(("CYRILLIC", "LATIN"), "абвгдђежзијклљмнњопрстћуфхцчџшčćđšž"),
    "el": Language(("GREEK",)),
    "he": Language(("HEBREW",)),
    "ar": Language(("ARABIC",)),
    "fa": Language(("ARABIC", "EXTENDED")),
    "ur": Language(("ARABIC", "EXTENDED")),
    "hi": Language(("DEVANAGARI",)),
    "mr": Language(("DEVANAGARI",)),
    "bn": Language(("BENGALI",)),
    "pa": Language(("GURMUKHI",)),
    "gu": Language(("GUJARATI",)),
    "ta": Language(("TAMIL",)),
    "te": Language(("TELUGU",)),
    "kn": Language(("KANNADA",)),
    "ml": Language(("MALAYALAM",)),
    "th": Language(("THAI",)),
    "ka": Language(("GEORGIAN",)),
    "hy": Language(("ARMENIAN",)),
    "am": Language(("ETHIOPIC",)),
    "zh": Language(("CJK", "BOPOMOFO", "FULLWIDTH")),
    "ja": Language(("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH")),
    "ko": Language(("HANGUL",)),
}
_ALPHABETS = ("LATIN", "CYRILLIC")  # scripts that the letters above divide further
_COMMON = ("COMBINING", "MICRO")  # accents of their own, and the unit prefix
_ASCII = "abcdefghijklmnopqrstuvwxyz"


def parse(codes: str) -> tuple[str, ...]:
    """'en,de' as known codes, sorted. Raises ConfigError naming every unknown one."""
    names = tuple(sorted({part.strip().lower() for part in codes.split(",") if part.strip()}))
    unknown = [f"unknown language '{n}'{suggest(n, LANGUAGES)}" for n in names if n not in LANGUAGES]
    if unknown or not names:
        raise ConfigError(
            unknown or "no language is named", f"languages:en,de; known: {', '.join(LANGUAGES)}"
        )
    return names


class Alphabet:
    """Whether a text can be written in any of these languages."""

    def __init__(self, codes: Sequence[str]) -> None:
        languages = [LANGUAGES[code] for code in codes]
        self._scripts = {script for one in languages for script in one.scripts}
        letters = {c for one in languages for c in one.letters}
        if "LATIN" in self._scripts:
            letters |= set(_ASCII)
        self._letters = letters | {c.upper() for c in letters if len(c.upper()) == 1}
        self._seen: dict[str, bool] = {}

    def writes(self, text: str) -> bool:
        """Digits, marks, spaces and signs that no script owns belong to every language."""
        return all(self._allowed(c) for c in text)

    def _allowed(self, c: str) -> bool:
        found = self._seen.get(c)
        if found is None:
            found = self._seen[c] = self._decide(c)
        return found

    def _decide(self, c: str) -> bool:
        kind = unicodedata.category(c)
        if not (kind[0] in "LM" or (kind == "Nd" and c > "9")):
            return True
        script = re.split("[ -]", unicodedata.name(c, "?"))[0]
        if script in _ALPHABETS:
            return c in self._letters
        return script in self._scripts or script in _COMMON or c in self._letters


# written for this file: everyday prose, to see how many tokens longer a text becomes
SAMPLES: Mapping[str, str] = {
    "en": "The ferry leaves at half past seven, so we packed the night before. My sister brought an old "
    "map, two sandwiches and far too many books. Nobody minded when the rain began: there was hot "
    "tea in the cabin, and the harbour lights looked like a small town that had decided to go "
    "swimming.",
    "de": "Die Fähre legt um halb acht ab, deshalb haben wir schon am Vorabend gepackt. Meine Schwester "
    "brachte eine alte Karte, zwei belegte Brote und viel zu viele Bücher mit. Als es zu regnen "
    "begann, störte das niemanden: In der Kajüte gab es heißen Tee, und die Lichter im Hafen sahen "
    "schön aus.",
    "fr": "Le bac part à sept heures et demie, alors nous avons fait les valises la veille. Ma sœur a "
    "apporté une vieille carte, deux sandwichs et beaucoup trop de livres. Quand la pluie a "
    "commencé, personne ne s'est plaint : il y avait du thé chaud dans la cabine.",
    "es": "El barco sale a las siete y media, así que hicimos las maletas la noche anterior. Mi hermana "
    "trajo un mapa viejo, dos bocadillos y demasiados libros. A nadie le importó que empezara a "
    "llover: en la cabina había té caliente y mañana volverá el sol.",
    "ru": "Паром отходит в половине восьмого, поэтому мы собрали вещи накануне вечером. Сестра взяла "
    "старую карту, два бутерброда и слишком много книг. Когда пошёл дождь, никто не расстроился: в "
    "каюте был горячий чай.",
    "ar": "تغادر العبارة في السابعة والنصف، لذلك حزمنا أمتعتنا في الليلة السابقة. أحضرت أختي خريطة قديمة "
    "وشطيرتين وكتبا كثيرة جدا. لم يهتم أحد عندما بدأ المطر، فقد كان هناك شاي ساخن.",
    "hi": "नाव साढ़े सात बजे चलती है, इसलिए हमने रात को ही सामान बाँध लिया। मेरी बहन एक पुराना नक्शा और "
    "बहुत सारी किताबें ले आई। बारिश शुरू हुई तो किसी को बुरा नहीं लगा, क्योंकि कमरे में गरम चाय थी।",
    "zh": "渡轮七点半出发，所以我们前一天晚上就收拾好了行李。姐姐带了一张旧地图、两个三明治和太多的书。下雨"
    "的时候谁也不介意，因为船舱里有热茶，港口的灯光看起来像一座小城。",
    "ja": "フェリーは七時半に出るので、前の晩に荷造りをしました。姉は古い地図とサンドイッチを二つ、それに本"
    "をたくさん持ってきました。雨が降り始めても、船室には熱いお茶があったので誰も気にしませんでした。",
    "ko": "배가 일곱 시 반에 떠나서 우리는 전날 밤에 짐을 쌌습니다. 언니는 낡은 지도와 샌드위치 두 개, "
    "그리고 책을 너무 많이 가져왔습니다. 비가 오기 시작했지만 선실에 뜨거운 차가 있어서 아무도 신경 "
    "쓰지 않았습니다.",
    "code": "def departures(harbour, after=None):\n"
    "    rows = [r for r in harbour.rows if not r.cancelled]\n"
    "    if after is not None:\n"
    "        rows = [r for r in rows if r.time >= after]\n"
    "    return sorted(rows, key=lambda r: (r.time, r.pier))\n"
    "\n"
    "for (int i = 0; i < n; ++i) { total += price[i] * 1.19; }\n"
    "SELECT name FROM ships WHERE id = 42;\n",
}
