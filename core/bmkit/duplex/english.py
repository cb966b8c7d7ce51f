"""English words by what they do in a sentence: no list is complete, and none has to be."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPEN = _words("""
    a about after am an and are around as at be because been before being between both but by can
    could did do does during each every for from get give had has have her his how i i'd i'm i'll
    i've if in instead into is it's its just like make my no not of on one or other our over really
    should since so some such tell than that's the their there these they they're those through to
    too under until very was we were we're what when where whether which while who whose why will
    with without would you're your um uh er
    """)
"""Behind these, a sentence has to go on, nearly always."""

STARTS = _words("""
    A An Any Are Am Been But And Can Could Did Do Does Don Explain Find Give Has Have Help How Is It
    Let List Make May My No Not Of On Or Please Say Should Show So Some Tell That The There These
    They This To Was We Were What When Where Which Who Whose Why Will Would Write Yes You Your If In
    For Since After Before Because Our Name Suggest Describe Remind Set Thanks Thank Nothing Maybe
    Just Got Went Every All Most Last Next Two Three Four One Then Also Actually Yeah Never
    """)
"""These begin a sentence, and are written small elsewhere."""

TELLS = _words("""
    The A An It They You If When In On To For And But So Then Most Some Many Also This That These
    Those There Your Its Each All One Try Use Add Keep Let Start With From At As Or
    """)
"""As `STARTS`, of an answer."""

NOT_THINGS = _words("""
    that this them then there here please thanks though well much more again mean means works work
    right wrong with from about like want know now today something anything nothing everything
    instead either first last really does done been doing going same each once also time least most
    best better worse said told have having being where when what which long ever before after mine
    yours tonight later yesterday tomorrow anymore myself yourself should would could will might
    need happens happen happened goes taste tastes look looks feel feels sound sounds start stop
    help
    """)
"""A query's last word that is none of these is often a thing, for which another may be heard."""

ASKS = _words("""
    what what's who who's whose which when where where's why how how's is isn't are aren't was were
    do does did don't didn't can could can't couldn't will would won't wouldn't should shouldn't has
    have had may must shall tell explain give show name write make help find list describe suggest
    recommend
    """)
"""A question or a request begins with one of these."""

COURTESIES = ("please", "thanks", "thank you", "then", "though", "now", "too", "again", "right")
"""A last slice that holds nothing but these is said with the one before it."""
