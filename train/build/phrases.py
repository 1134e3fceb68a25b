"""Words and phrases that `wording.py` makes questions of: data, no rules.

>>> GENERIC_OF["installation"][0]
'How do I install {}?'
"""

import re


def words_in(text: str) -> list[str]:
    """The words of a list that is written as text."""
    return text.split()


def terms_in(text: str) -> frozenset[str]:
    """The terms of a list that is written as text, with commas."""
    return frozenset(term.strip() for term in text.replace("\n", " ").split(","))


HOW = ("How do I {}?", "How can I {}?", "How to {}?", "What do I have to do to {}?")
ABOUT = (
    "What should I know about {}?",
    "Tell me about {}.",
    "Can you explain {}?",
    "What does the documentation say about {}?",
    "Explain {}.",
)
WHAT = ("What is {}?", "What is meant by {}?", "Can you explain what {} is?", "Explain what {} is.")
WORKS = ("How does {} work?", "Explain how {} works.")

# Verbs that begin headings, as in "Configure logging" or "Configuring logging".
VERBS = words_in(
    """
    add access activate adapt adjust allow analyze apply assign attach authenticate authorize automate avoid
    bind bootstrap broadcast bundle bypass calculate cancel capture choose clean clear clone combine compare
    compile complete compose compute configure connect construct contribute control convert create customise
    customize debug declare decode decorate define delete deploy describe detect determine develop diagnose
    disable discover distribute download edit embed enable encode encrypt enforce ensure evaluate execute
    expand explore expose extend extract fetch find fix generate get handle hide implement improve include
    increase inherit initialise initialize inject insert inspect install instrument integrate invoke isolate
    iterate join keep launch learn make manage manipulate measure migrate minimise modify monitor move obtain
    open optimise optimize organise organize overload override parallelise parse perform prepare preserve
    prevent produce propagate protect provide provision quantize query raise read receive reconnect recover
    redirect reduce register remove rename render reorder replace reproduce reset resolve restart restore
    restrict resume retrieve reuse revert revoke save scale secure select send serialize serve share simplify
    skip solve specify structure submit subscribe substitute suppress switch synchronize tell throw transform
    translate troubleshoot tune understand uninstall unpack upload use validate verify visualize write
    """
)
# These are nouns as often as verbs: only a determiner or preposition behind them tells.
BOTH = words_in(
    """
    batch benchmark block build cache call change check copy display document export filter format group
    import limit list load lock log map mark match merge mock mount name order package pass patch plan plot
    print process profile publish push record release report request return route run sample schedule script
    search set shape sign sort split start stop store stream support test time trace track train transfer type
    update upgrade view watch work wrap
    """
)
DOUBLED = set(
    words_in(
        """
    get run set stop map log plan plot wrap debug submit skip plug split begin
    """
    )
)
DETERMINERS = set(
    words_in(
        """
    a an the your all multiple custom several one more many another any it our
    """
    )
)
PREPOSITIONS = set(
    words_in(
        """
    with from in on for via without into as against inside outside behind to by at up
    """
    )
)
NOUN_GERUNDS = set(
    words_in(
        """
    build log train test cache map package stream process serve render format type encode decode time set
    embed bind parse schedule track match order route batch debug profile sample sign split broadcast trace
    lock release mock load
    """
    )
)

# Headings that say nothing without what they belong to. {} is that.
GENERIC = {
    "installation|install|installing|setup|set up|how to install|installation instructions": (
        "How do I install {}?",
        "How can I install {}?",
    ),
    "usage|basic usage|how to use|using|use|how to use it": ("How do I use {}?", "Show me how to use {}."),
    "quickstart|quick start|getting started|get started|first steps|tutorial": (
        "How do I get started with {}?",
        "How do I begin with {}?",
    ),
    "example|examples|basic example|simple example|usage example|usage examples|code example|sample|demo|"
    "example usage|example code|code examples|sample code": ("Show me an example of {}.", "Give me an example of {}."),
    "requirements|prerequisites|dependencies|system requirements": ("What does {} require?", "What do I need for {}?"),
    "features|key features|main features|major features|core features|highlights": (
        "What are the features of {}?",
        "What can {} do?",
    ),
    "overview|introduction|about|summary|description|purpose|basics|in short|what is it|at a glance|abstract": (
        "What is {}?",
        "Give me an overview of {}.",
        "Explain {} in short.",
    ),
    "motivation|rationale|background|why|goals": ("Why is there {}?", "What is the motivation behind {}?"),
    "limitations|known issues|caveats|known limitations|gotchas|pitfalls": (
        "What are the limitations of {}?",
        "Which limits does {} have?",
    ),
    "options|settings|command line options|available options|configuration options|flags": (
        "What are the options of {}?",
        "Which options does {} have?",
    ),
    "parameters|arguments|inputs|input parameters": (
        "What are the parameters of {}?",
        "Which parameters does {} take?",
    ),
    "returns|return value|return values|outputs|output": ("What does {} return?", "What is the output of {}?"),
    "configuration|configuring|config|configure": ("How do I configure {}?", "How is {} configured?"),
    "troubleshooting|common problems|common errors|errors": (
        "What can go wrong with {}, and what helps?",
        "How do I troubleshoot {}?",
    ),
    "tests|testing|running tests|run tests|running the tests|test": (
        "How do I run the tests of {}?",
        "How is {} tested?",
    ),
    "development|developing|local development|development setup": (
        "How do I develop {}?",
        "How do I set up the development of {}?",
    ),
    "building|build|building from source|compiling|build from source": (
        "How do I build {}?",
        "How do I build {} from source?",
    ),
    "deployment|deploying|deploy": ("How do I deploy {}?", "How is {} deployed?"),
    "uninstall|uninstallation|uninstalling": ("How do I uninstall {}?",),
    "upgrade|upgrading|update|updating": ("How do I upgrade {}?", "How do I update {}?"),
    "commands|available commands|cli|command line": ("Which commands does {} have?", "What are the commands of {}?"),
    "architecture|design|structure|internals|implementation": ("How is {} built?", "What is the design of {}?"),
    "performance|benchmarks|benchmark|results": ("How does {} perform?", "What is known about the performance of {}?"),
    "compatibility|supported versions|supported platforms|versions": (
        "What is {} compatible with?",
        "What does {} support?",
    ),
    "tips|best practices|recommendations|tips and tricks|guidelines": (
        "What are the best practices for {}?",
        "What is recommended for {}?",
    ),
    "notes|note|remarks|details|more|advanced|advanced usage|general|misc|other|additional information|conclusion": (
        "What else should I know about {}?",
        "What are the details of {}?",
    ),
    "how it works|how does it work": WORKS,
    "syntax|format|grammar": ("What is the syntax of {}?", "How is {} written?"),
    "api|api reference|reference": ("What does the API of {} offer?", "Describe the API of {}."),
    "security|authentication|logging|caching|debugging|error handling|error messages|customization|permissions": (),
}
GENERIC_OF = {name: phrases for names, phrases in GENERIC.items() for name in names.split("|")}

# Of these, the answer is about all of it, whatever the heading above is.
OF_THE_WHOLE = {
    GENERIC_OF[name]
    for name in ("installation", "quickstart", "tests", "development", "building", "deployment", "uninstall", "upgrade")
}

# Sections, with all below them, that are about the project's affairs or about the page.
UNASKED = re.compile(
    r"(?:the )?(?:(?:mit |apache |software |bsd )?licen[sc]es?(?: .*)?|licensing|copyrights?(?: .*)?|"
    r"legal(?: .*)?|trademarks?|contribut(?:ing|ors?|ions?|e)(?: .*)?|"
    r"how to contribute|credits?|acknowledge?ments?|authors?|maintainers?|change ?logs?|changes|changes? in .*|"
    r"release notes?|releases?|release history|"
    r"what'?s new.*|history|news|roadmap|todos?|to do|table of contents|contents|toc|index|indices and tables|"
    r"links?|useful links|see also|references?|"
    r"bibliography|further reading|related(?: \w+)?|resources|sponsors?|backers|donat\w+|funding|support|"
    r"supporters|community|contacts?|contact us|badges|"
    r"navigation|on this page|citations?|citing.*|how to cite|cite|code of conduct|thanks(?: to)?|star history|"
    r"disclaimer|feedback|getting help|"
    r"get help|help|documentation|docs|downloads?|next steps?|what'?s next|where next|footnotes|project links|"
    r"security policy|reporting .*|security contact.*|"
    r"bug reports?|questions|issues|stay in touch|who uses .*|used by|users|adopters|testimonials|press|team|"
    r"versioning|pull requests?|"
    r".*\((?:unreleased|\d{4}-\d\d-\d\d|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\w* \d.*)\)|(?:v|"
    r"version |release )?\[?v?\d+\.\d+[\w.\]+-]*(?: .*)?|\d{4}-\d\d.*|\[?unreleased\]?.*|doi|authorship|"
    r"mailing lists?|irc|chat|discord|discussions?|"
    r"source code|source|(?:\w+ )?status|tweets|opinions|endorsements|videos?|talks|blog posts?|articles|"
    r"presentations|newsletter|careers|jobs|"
    r"hiring|join .*|awards|partners|\w+ conf|the team|about (?:us|the authors?)|"
    r"for enterprise|professional support|(?:commercial|enterprise) support)",
    re.I,
)
STARTS = re.compile(
    r"^(?:what|why|when|where|which|who|whose|how|can|could|does|do|is|are|should|will|may|must|did|was)\b", re.I
)
