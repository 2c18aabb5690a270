// Waits for what other cores send to this one and lets the compute kernel go on. It moves no data: senders
// write where the data belong.
#define DELAY_KERNEL 1
#include "mail.h"

void kernel_main() {
    carry_out(READER, [](uint32_t mailbox, uint32_t word, volatile tt_l1_ptr uint32_t*) {
        if ((word & 0xff) == WAIT) {
            wait_for(mailbox, word >> 16, (word >> 8) & 0xff);
        } else {  // GIVE
            cb_push_back(GO, 1);
        }
        return 0;
    });
}
