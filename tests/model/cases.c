/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table of models and their expected verdicts. Groups:
 *   slots  how many slots S outstanding operations need: W = 2S, and one less is found to break
 *   flat   one rank per node
 *   hops   two hops: several ranks per node, also unequal
 *   wire   messages in any order and at any time, put twice
 *   rules  every rule switched off once, and found missing
 * Each small enough that all of them together take well under a minute; --big has the larger ones.
 */
#include "cases.h"

#define COUNTS_LOST "COUNTS are put into a slot that a rank of the node still needs"
#define TILE_LOST   "a tile is put into a slot whose tile a reader has not read"

#define SAFE(group, words)                                                                         \
    {                                                                                              \
        group, words, VERDICT_SAFE, NULL, false                                                    \
    }
#define BREAKS(group, words, broken)                                                               \
    {                                                                                              \
        group, words, VERDICT_VIOLATION, broken, false                                             \
    }
#define STUCK(group, words)                                                                        \
    {                                                                                              \
        group, words, VERDICT_DEADLOCK, NULL, false                                                \
    }
#define BIG(words)                                                                                 \
    {                                                                                              \
        "big", words, VERDICT_SAFE, NULL, true                                                     \
    }

const struct model_case model_cases[] = {
    BREAKS("slots", "nodes=1,1 s=1 w=1 ops=DDDD", COUNTS_LOST),
    SAFE("slots", "nodes=1,1 s=1 w=2 ops=DDDDDDDD"),
    BREAKS("slots", "nodes=1,1 s=2 w=2 ops=DDDDDD", COUNTS_LOST),
    BREAKS("slots", "nodes=1,1 s=2 w=3 ops=DDDDDD", COUNTS_LOST),
    SAFE("slots", "nodes=1,1 s=2 w=4 ops=DDDDDDDD"),
    BREAKS("slots", "nodes=1,1 s=3 w=4 ops=DDDDDDDD", COUNTS_LOST),
    BREAKS("slots", "nodes=1,1 s=3 w=5 ops=DDDDDDDD", COUNTS_LOST),
    SAFE("slots", "nodes=1,1 s=3 w=6 ops=DDDDDDDD"),
    BREAKS("slots", "nodes=2,2 s=1 w=1 ops=DDDD joint", COUNTS_LOST),
    SAFE("slots", "nodes=2,2 s=1 w=2 ops=DDDDDDDD joint"),
    BREAKS("slots", "nodes=2,2 s=2 w=3 ops=DDDDDD joint", COUNTS_LOST),
    SAFE("slots", "nodes=2,2 s=2 w=4 ops=DDDDDDDD joint"),
    BREAKS("slots", "nodes=2,2 s=3 w=5 ops=DDDDDDDD joint", COUNTS_LOST),
    SAFE("slots", "nodes=2,2 s=3 w=6 ops=DDDDDDD joint"),
    BREAKS("slots", "nodes=2,2 s=2 w=3 ops=CCCCCC joint", COUNTS_LOST),
    SAFE("slots", "nodes=2,2 s=2 w=4 ops=CCCCCC joint"),

    SAFE("flat", "nodes=1,1 s=1 ops=DCDCDCDC"),
    SAFE("flat", "nodes=1,1 s=2 ops=DDCCDDCC tiles=2 traffic=varied"),
    SAFE("flat", "nodes=1,1 s=1 ops=DCD tiles=5"),
    SAFE("flat", "nodes=1,1 s=1 v=4 ops=DCD tiles=6"),
    SAFE("flat", "nodes=1,1 s=2 v=6 ops=DCDC tiles=4"),
    SAFE("flat", "nodes=1,1 s=2 ops=DCDC tiles=3"),
    SAFE("flat", "nodes=1,1 s=1 ops=CCC tiles=4 ring=1"),
    SAFE("flat", "nodes=1,1,1 s=1 ops=DCDC"),
    SAFE("flat", "nodes=1,1,1 s=2 ops=DDCCDC joint"),
    SAFE("flat", "nodes=1,1,1 s=1 ops=DCCD tiles=2 traffic=varied"),
    SAFE("flat", "nodes=1,1,1 s=1 ops=D tiles=3 joint"),

    SAFE("hops", "nodes=2,2 s=1 ops=DCDC"),
    SAFE("hops", "nodes=2,2 s=2 ops=DDCCDD joint"),
    SAFE("hops", "nodes=2,2 s=2 ops=DDCC joint ahead=calls"),
    SAFE("hops", "nodes=2,2 s=2 ops=DCDC joint ahead=always"),
    SAFE("hops", "nodes=2,2 s=1 ops=DD tiles=3 joint"),
    SAFE("hops", "nodes=1,2 s=1 v=3 ops=DC tiles=4 joint"),
    SAFE("hops", "nodes=2,2 s=2 ops=DCCD tiles=2 traffic=varied joint"),
    SAFE("hops", "nodes=2,2 s=1 ops=DCCCD tiles=2 traffic=quiet joint"),
    SAFE("hops", "nodes=1,2 s=1 ops=DCDC tiles=2 traffic=varied"),
    SAFE("hops", "nodes=1,2 s=2 ops=DCDC"),
    SAFE("hops", "nodes=1,2 s=1 ops=DD tiles=3 skip"),
    SAFE("hops", "nodes=1,2 s=1 ops=CC tiles=3 ring=1 joint"),
    SAFE("hops", "nodes=2,1 s=2 ops=DDCC tiles=2 traffic=varied"),
    SAFE("hops", "nodes=2,1 s=1 ops=DCC ring=1 tiles=2"),
    SAFE("hops", "nodes=1,3 s=1 ops=DCDC joint"),

    SAFE("wire", "nodes=1,1 s=2 ops=DCDCD delays"),
    SAFE("wire", "nodes=1,1 s=1 ops=DCD delays repeats"),
    SAFE("wire", "nodes=1,1 s=1 ops=D tiles=5 delays repeats mod=4"),
    SAFE("wire", "nodes=1,1 s=1 ops=C tiles=4 delays repeats"),
    SAFE("wire", "nodes=1,1 s=1 ops=D tiles=8 delays mod=3"),
    SAFE("wire", "nodes=1,1 s=1 v=4 ops=DDDDDDD delays traffic=burst tiles=6 mod=8"),
    SAFE("wire", "nodes=1,1 s=1 ops=DDDDDDDD delays mod=2"),
    SAFE("wire", "nodes=1,1 s=2 ops=DDDDDDD delays traffic=varied tiles=2 mod=5"),
    SAFE("wire", "nodes=1,1 s=1 ops=DDDDDDD delays traffic=burst tiles=4 mod=5"),
    SAFE("wire", "nodes=1,1 s=1 ops=CCCCC delays traffic=burst tiles=4 mod=5"),
    SAFE("wire", "nodes=1,1 s=1 ops=D tiles=8 delays mod=5 span=2"),
    SAFE("wire", "nodes=1,1 s=1 ops=C tiles=6 delays mod=5 span=2"),
    SAFE("wire", "nodes=1,1 s=1 ops=D tiles=6 delays mod=6 span=3"),
    SAFE("wire", "nodes=1,1 s=2 ops=DDDDD delays traffic=varied tiles=2 mod=7 span=2"),
    SAFE("wire", "nodes=1,1 s=1 ops=DDDDDDD delays traffic=burst tiles=4 mod=5 span=2"),
    SAFE("wire", "nodes=1,1,1 s=1 ops=DC delays joint"),
    SAFE("wire", "nodes=2,2 s=1 ops=DC delays joint"),
    SAFE("wire", "nodes=1,2 s=1 ops=DCD delays"),
    SAFE("wire", "nodes=2,1 s=1 ops=DCD delays"),

    BREAKS("rules", "nodes=2,2 s=1 ops=DCCC traffic=quiet joint off=r1", COUNTS_LOST),
    BREAKS("rules", "nodes=2,2 s=1 w=8 ops=DCCCD tiles=5 traffic=quiet joint off=r1", TILE_LOST),
    BREAKS("rules", "nodes=2,2 s=2 ops=DCCCCC traffic=quiet joint off=r1", COUNTS_LOST),
    BREAKS("rules", "nodes=1,1 s=1 ops=DDD off=r2", COUNTS_LOST),
    BREAKS("rules", "nodes=1,1 s=1 ops=DD tiles=3 off=r3", TILE_LOST),
    BREAKS("rules", "nodes=1,1 s=1 v=4 ops=DD tiles=6 off=r3", TILE_LOST),
    BREAKS("rules", "nodes=1,1 s=1 ops=DDD delays repeats off=r4",
           "repeated COUNTS are written over newer ones"),
    BREAKS("rules", "nodes=1,1 s=1 ops=D tiles=4 delays repeats off=r4",
           "a repeated tile is written over a newer one"),
    BREAKS("rules", "nodes=2,2 s=1 ops=D off=lend",
           "an input goes back to its caller while a neighbour reads it"),
    BREAKS("rules", "nodes=2,2 s=1 ops=C ring=1 off=lend",
           "staged rows go back to their rank before they are summed"),
    STUCK("rules", "nodes=1,2 s=1 ops=DD tiles=4 skip off=duty"),
    STUCK("rules", "nodes=1,1 s=1 ops=D tiles=3 off=send-returns"),
    STUCK("rules", "nodes=1,1 s=1 ops=D tiles=6 delays off=credit-max,credit-single"),
    BREAKS("rules", "nodes=1,1 s=1 ops=D tiles=7 delays mod=4 off=credit-single",
           "a CREDIT is taken for another number"),
    BREAKS("rules", "nodes=1,1 s=1 ops=D tiles=8 delays mod=4 span=2",
           "a CREDIT is taken for another number"),
    BREAKS("rules",
           "nodes=1,1 s=2 ops=DDDDDDD delays traffic=varied tiles=2 mod=5 off=credit-settled",
           "a CREDIT is taken for another number"),
    BREAKS("rules", "nodes=1,1 s=1 ops=DDD delays repeats mod=3",
           "an immediate is taken for another tile"),
    BREAKS("rules", "nodes=1,1 s=1 v=3 ops=D tiles=4 delays repeats mod=5",
           "an immediate is taken for another tile"),
    BREAKS("rules", "nodes=1,1 s=1 ops=DDDDDDDD delays mod=6 stale",
           "a new tile is dropped as an old one"),
    BREAKS("rules", "nodes=1,1 s=1 ops=DDDDDDD delays traffic=burst tiles=4 mod=5 credit-stale",
           "a CREDIT is taken for another number"),
    SAFE("rules", "nodes=1,1 s=1 ops=DDDD off=implicit"),
    SAFE("rules", "nodes=1,1 s=1 ops=DDDD off=credit-infer"),

    BIG("nodes=1,1 s=1 ops=DD tiles=3 delays repeats"),
    BIG("nodes=1,1 s=1 v=3 ops=D tiles=4 delays repeats mod=6"),
    BIG("nodes=1,1 s=1 ops=DDD tiles=3 delays repeats"),
    BIG("nodes=1,1 s=2 ops=DCDCDC tiles=5"),
    BIG("nodes=1,1 s=2 ops=DDDDDDDD delays traffic=varied tiles=2 mod=5"),
    BIG("nodes=2,2 s=1 ops=DC tiles=3 joint"),
    BIG("nodes=2,2 s=2 ops=DDCC"),
    BIG("nodes=2,2 s=1 ops=DCD delays joint"),
    BIG("nodes=1,1,1 s=1 ops=DC tiles=3 joint"),
    BIG("nodes=1,1,1 s=1 ops=DCD delays"),
    BIG("nodes=1,1,1 s=2 ops=DCDC tiles=2"),
    BIG("nodes=1,2 s=2 ops=DCD delays"),
    BIG("nodes=1,2 s=1 ops=DC delays repeats joint"),
    BIG("nodes=2,3 s=1 ops=DCDC joint"),
    {0}};
