// Sends results to the cores that read them.
#define DELAY_KERNEL 2
#include "mail.h"

using Words = volatile tt_l1_ptr uint32_t*;

inline uint64_t place(uint32_t core, uint32_t address) { return get_noc_addr(core & 0xff, core >> 8, address); }

inline void move(uint32_t rows, Words words) {
    const uint32_t steps = words[3];
    const uint32_t bytes = (steps & 0xffff) * 16, source_step = (steps >> 16) * 16, target_step = words[4] * 16;
    uint32_t source = words[1];
    uint64_t target = place(words[0], words[2]);
    for (; rows > 0; --rows) {
        noc_async_write(source, target, bytes);
        source += source_step;
        target += target_step;
    }
}

void kernel_main() {
    carry_out(WRITER, [](uint32_t mailbox, uint32_t word, Words words) {
        const uint32_t count = (word >> 8) & 0xff;
        switch (word & 0xff) {
            case WAIT: wait_for(mailbox, word >> 16, count); return 0;
            case TAKE:
                cb_wait_front(SEND, count);
                cb_pop_front(SEND, count);
                return 0;
            case MOVE: move(count, words); return 5;
            case SIGNAL:
                noc_async_write_barrier();
                noc_semaphore_inc(place(words[0], mailbox + words[1] * COUNTER_BYTES), 1);
                return 2;
            case TALLY: {
                noc_async_write_barrier();  // the source may be overwritten from now on
                volatile tt_l1_ptr uint32_t* counter = counter_at(mailbox, word >> 16);
                counter[0] = counter[0] + 1;
            }
        }
        return 0;
    });
    noc_async_atomic_barrier();
}
