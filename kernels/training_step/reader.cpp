// Waits for what other cores send to this one and lets the compute kernel go on. It moves no data: senders
// write where the data belong.
#define DELAY_KERNEL 1
#include "mail.h"

void kernel_main() {
    const uint32_t table = get_common_arg_val<uint32_t>(TABLE_ADDRESS);
    const uint32_t mailbox = get_common_arg_val<uint32_t>(MAILBOX_ADDRESS);
    const uint32_t num_segments = get_common_arg_val<uint32_t>(NUM_SEGMENTS);
    auto words = reinterpret_cast<volatile tt_l1_ptr uint32_t*>(table);

    for (uint32_t segment = 0; segment < num_segments; ++segment) {
        const uint32_t section = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment);
        uint32_t times = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment + 1);
        const uint32_t begin = words[3 * section + READER];
        for (; times > 0; --times) {
            for (uint32_t at = begin;;) {
                const uint32_t word = words[at++];
                const uint32_t code = word & 0xff;
                if (code == FINISH) {
                    break;
                }
                dawdle();
                if (code == WAIT) {
                    wait_for(mailbox, word >> 16, (word >> 8) & 0xff);
                } else {  // GIVE
                    cb_push_back(GO, 1);
                }
            }
        }
    }
}
