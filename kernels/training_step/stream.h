// What the three kernels of a core and the host that writes their instructions agree on.
// pctt/backends/fused_stream.py reads the numbers from here.
#pragma once

#include <cstdint>

// --- the table of a core ------------------------------------------------------------------------------------
// Three words per section, one per processor: where its instructions begin, in words from the table.

enum Processor : uint32_t { COMPUTE = 0, READER = 1, WRITER = 2 };

// --- common runtime arguments -------------------------------------------------------------------------------

enum Argument : uint32_t {
    TABLE_ADDRESS = 0,   // of the table of each core, in its L1
    MAILBOX_ADDRESS = 1, // of the counters of each core
    NUM_SEGMENTS = 2,
    NUMBERS = 3,  // rates and factors, as the bits of a float
    SEGMENTS = 19 // per segment: section, how many times
};

// --- circular buffers ---------------------------------------------------------------------------------------
// None carries tiles from one kernel to another. The first seven stand for formats: kernels set their pointers
// to the tensor that an instruction names. The last three carry tokens.

enum Window : uint32_t {
    FLOAT32_TO_DEST = 0, // read by elementwise work, all 24 bits
    BFLOAT16_IN0 = 1,    // read by elementwise work and as in0 of products
    FLOAT32_IN0 = 2,
    BFLOAT16_IN1 = 3,
    FLOAT32_IN1 = 4,
    FLOAT32_OUT = 5,
    BFLOAT16_OUT = 6,
    GO = 7,   // reader to unpacker: what the next instruction waits for has arrived
    DONE = 8, // packer to unpacker: an instruction has written its result
    SEND = 9  // packer to writer: likewise, and the writer has something to do
};

// --- instructions of the compute kernel ---------------------------------------------------------------------
// The first word of each: code | go << 8 | done << 9 | send << 25, where `go` waits for a token of the reader,
// `done` for the results of so many earlier instructions, and `send` gives a token to the writer. END waits too.

enum Code : uint32_t { END = 0, PRODUCT = 1, ELEMENTWISE = 2, TRANSPOSE = 3, NOTHING = 4 };

// PRODUCT: out, in0, in1 addresses; rows | inner << 8 | columns << 16, in tiles; steps of in1 from one inner
// index to the next | from one column to the next << 16, in tiles; flags.
enum ProductFlag : uint32_t { IN0_BFLOAT16 = 1, IN1_BFLOAT16 = 2, OUT_BFLOAT16 = 4, TRANSPOSED = 8 };

// TRANSPOSE: out, in addresses; rows | columns << 8 of in, in tiles; 1 if bfloat16, else 0.

// ELEMENTWISE: number of tiles, then links up to STOP, all of which serve one tile and then the next.
// A link: kind | register << 8 | second register << 12 | flags << 16, then its parameters.
enum Link : uint32_t {
    STOP = 0,
    LOAD = 1,    // address; flags: 1 bfloat16 | tiles after which to begin again << 1, 0 for never
    KEEP = 2,    // the registers are as they will be stored
    STORE = 3,   // address; flags: 1 bfloat16
    ADD = 4,     // of the registers; flags: register of the result
    SUBTRACT = 5,
    MULTIPLY = 6,
    ADD_PRODUCT = 7, // register + second register * third; flags: third register | register of the result << 4
    COPY = 8,    // to the second register
    ROUND = 9,  // to bfloat16, to nearest
    SUM_ROWS = 10, // to the first row
    FILL = 11,   // bits of a float
    NUMBER = 12, // fill with the number of that index
    SCALE = 13,  // times the number of that index
    SHIFT = 14,  // plus the number of that index
    // functions; with a parameter, the bits of a float
    ADD_CONSTANT = 16,
    MULTIPLY_CONSTANT = 17,
    SUBTRACT_FROM = 18,
    TANH = 19,
    SIGMOID = 20,
    RELU = 21,
    LEAKY_RELU = 22,
    SQUARE = 23,
    ABOVE_ZERO = 24,
    SILU = 25,
    ERF = 26,
    EXP = 27,
    SQRT = 28,
    RECIPROCAL = 29,
    CLAMP = 30 // two parameters
};

// --- instructions of the data movement kernels --------------------------------------------------------------
// code | count << 8; WAIT and TALLY: | counter << 16.

enum Movement : uint32_t {
    FINISH = 0,
    WAIT = 1,   // until so many more messages have come on a counter
    GIVE = 2,   // reader: a token to the compute kernel
    TAKE = 3,   // writer: so many tokens of the compute kernel
    MOVE = 4,   // writer: `count` rows to a core: x | y << 8, source, target, bytes of a row | step of the
                // source << 16, step of the target, in units of 16 bytes
    SIGNAL = 5, // writer: one message: x | y << 8, counter; after all MOVEs before it have arrived
    TALLY = 6   // writer: one message to this very core, on that counter
};

// Two words per counter: how many messages have come, and how many its owner has waited for. They outlive a
// launch, so that nothing has to set them back.
constexpr uint32_t COUNTER_BYTES = 32;

// The first counter counts no messages. With COUNT_WORK the compute kernel leaves there what it has done since
// the mailbox was made: products of tiles, links, instructions.
constexpr uint32_t WORK_COUNTER = 0;
