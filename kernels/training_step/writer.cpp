// Sends results to the cores that read them.
#define DELAY_KERNEL 2
#include "mail.h"

void kernel_main() {
    const uint32_t table = get_common_arg_val<uint32_t>(TABLE_ADDRESS);
    const uint32_t mailbox = get_common_arg_val<uint32_t>(MAILBOX_ADDRESS);
    const uint32_t num_segments = get_common_arg_val<uint32_t>(NUM_SEGMENTS);
    auto words = reinterpret_cast<volatile tt_l1_ptr uint32_t*>(table);

    for (uint32_t segment = 0; segment < num_segments; ++segment) {
        const uint32_t section = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment);
        uint32_t times = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment + 1);
        const uint32_t begin = words[3 * section + WRITER];
        for (; times > 0; --times) {
            for (uint32_t at = begin;;) {
                const uint32_t word = words[at++];
                const uint32_t code = word & 0xff;
                const uint32_t count = (word >> 8) & 0xff;
                if (code == FINISH) {
                    break;
                }
                dawdle();
                switch (code) {
                    case WAIT: wait_for(mailbox, word >> 16, count); break;
                    case TAKE:
                        cb_wait_front(SEND, count);
                        cb_pop_front(SEND, count);
                        break;
                    case MOVE: {
                        const uint32_t core = words[at];
                        uint32_t source = words[at + 1];
                        const uint32_t steps = words[at + 3];
                        const uint32_t bytes = (steps & 0xffff) * 16;
                        const uint32_t source_step = (steps >> 16) * 16;
                        const uint32_t target_step = words[at + 4] * 16;
                        uint64_t target = get_noc_addr(core & 0xff, core >> 8, words[at + 2]);
                        at += 5;
                        for (uint32_t row = 0; row < count; ++row) {
                            noc_async_write(source, target, bytes);
                            source += source_step;
                            target += target_step;
                        }
                        break;
                    }
                    case SIGNAL: {
                        const uint32_t core = words[at];
                        const uint32_t counter = words[at + 1];
                        at += 2;
                        noc_async_write_barrier();
                        noc_semaphore_inc(
                            get_noc_addr(core & 0xff, core >> 8, mailbox + counter * COUNTER_BYTES), 1);
                        break;
                    }
                    case TALLY: {
                        noc_async_write_barrier();  // the source may be overwritten from now on
                        volatile tt_l1_ptr uint32_t* counter = counter_at(mailbox, word >> 16);
                        counter[0] = counter[0] + 1;
                        break;
                    }
                }
            }
        }
    }
    noc_async_atomic_barrier();
}
