// Counters in L1 that other cores raise: how the data movement kernels wait for each other.
#pragma once

#include "api/dataflow/dataflow_api.h"
#include "stream.h"

inline volatile tt_l1_ptr uint32_t* counter_at(uint32_t mailbox, uint32_t counter) {
    return reinterpret_cast<volatile tt_l1_ptr uint32_t*>(mailbox + counter * COUNTER_BYTES);
}

inline void wait_for(uint32_t mailbox, uint32_t counter, uint32_t messages) {
    volatile tt_l1_ptr uint32_t* words = counter_at(mailbox, counter);
    const uint32_t expected = words[4] + messages;
    words[4] = expected;
    do {
        invalidate_l1_cache();
    } while (static_cast<int32_t>(words[0] - expected) < 0);
}

// A test makes cores slow at random points, so that an order that only happens to be kept is noticed.
inline void dawdle() {
#ifdef DELAY_SEED
    static uint32_t state = 0;
    if (state == 0) {
        state = DELAY_SEED + 7919 * (my_x[0] + 31 * my_y[0]) + DELAY_KERNEL;
    }
    state = state * 1664525 + 1013904223;
    for (uint32_t left = (state >> 24) * DELAY_CYCLES; left > 0; --left) {
        asm volatile("nop");
    }
#endif
}

// Hands the instructions of one processor, section by section, to act(mailbox, word, rest), which returns how
// many words of the rest it took.
template <typename Act>
inline void carry_out(Processor processor, Act act) {
    const uint32_t table = get_common_arg_val<uint32_t>(TABLE_ADDRESS);
    const uint32_t mailbox = get_common_arg_val<uint32_t>(MAILBOX_ADDRESS);
    const uint32_t num_segments = get_common_arg_val<uint32_t>(NUM_SEGMENTS);
    auto words = reinterpret_cast<volatile tt_l1_ptr uint32_t*>(table);

    for (uint32_t segment = 0; segment < num_segments; ++segment) {
        const uint32_t section = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment);
        uint32_t times = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment + 1);
        const uint32_t begin = words[3 * section + processor];
        for (; times > 0; --times) {
            for (uint32_t at = begin;;) {
                const uint32_t word = words[at++];
                if ((word & 0xff) == FINISH) {
                    break;
                }
                dawdle();
                at += act(mailbox, word, words + at);
            }
        }
    }
}
