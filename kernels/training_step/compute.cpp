// Carries out the arithmetic of one core: products, and chains of elementwise functions that stay in the
// registers of the matrix unit from load to store.
#include "api/compute/cb_api.h"
#include "api/compute/common.h"
#include "api/compute/compute_kernel_api.h"
#include "api/compute/compute_kernel_hw_startup.h"
#include "api/compute/copy_dest_values.h"
#include "api/compute/eltwise_binary_sfpu.h"
#include "api/compute/eltwise_unary/addcmul.h"
#include "api/compute/eltwise_unary/binop_with_scalar.h"
#include "api/compute/eltwise_unary/clamp.h"
#include "api/compute/eltwise_unary/comp.h"
#include "api/compute/eltwise_unary/erf_erfc.h"
#include "api/compute/eltwise_unary/exp.h"
#include "api/compute/eltwise_unary/fill.h"
#include "api/compute/eltwise_unary/recip.h"
#include "api/compute/eltwise_unary/relu.h"
#include "api/compute/eltwise_unary/sqrt.h"
#include "api/compute/eltwise_unary/typecast.h"
#include "api/compute/matmul.h"
#include "api/compute/pack.h"
#include "api/compute/reconfig_data_format.h"
#include "api/compute/tile_move_copy.h"
#include "api/compute/transpose.h"
#include "stream.h"

using Words = volatile tt_l1_ptr uint32_t*;

constexpr uint32_t FLOAT32 = static_cast<uint32_t>(DataFormat::Float32);
constexpr uint32_t BFLOAT16 = static_cast<uint32_t>(DataFormat::Float16_b);
constexpr uint32_t ONE = 0x3f800000;
constexpr uint32_t NO_WINDOW = 0xff;
constexpr uint32_t MOST_TILES = 4;  // of float32, in the half of the registers that one side works on

// What has been done, for a check of the cost model.
struct Work {
    uint32_t products = 0, links = 0, instructions = 0;
};

#ifdef COUNT_WORK
#define COUNT(what) UNPACK((++work.what))
#else
#define COUNT(what)
#endif

// What the unpackers and the packer are set up for, so that they are set up anew only where that changes.
struct Standing {
    uint32_t loaded = NO_WINDOW, stored = NO_WINDOW;
};

ALWI void set_up_load(uint32_t window, Standing& standing) {
    if (standing.loaded != window) {
        reconfig_data_format_srca(window);
        copy_init(window);
        standing.loaded = window;
    }
}

ALWI void set_up_store(uint32_t window, Standing& standing) {
    if (standing.stored != window) {
        pack_reconfig_data_format(window);
        standing.stored = window;
    }
}

// The pointers of a window, in the units of 16 bytes that circular buffers count in.
ALWI void read_from(uint32_t window, uint32_t address) {
    UNPACK((get_local_cb_interface(window).fifo_rd_ptr = address >> 4));
}

ALWI void write_to(uint32_t window, uint32_t address) {
    PACK((get_local_cb_interface(window).fifo_wr_ptr = address >> 4));
}

ALWI void product(Words words, Standing& standing, [[maybe_unused]] Work& work) {
    const uint32_t sizes = words[3], steps = words[4], flags = words[5];
    const uint32_t rows = sizes & 0xff, inner = (sizes >> 8) & 0xff, columns = (sizes >> 16) & 0xff;
    const uint32_t inner_step = steps & 0xffff, column_step = steps >> 16;
    const uint32_t in0 = flags & IN0_BFLOAT16 ? BFLOAT16_IN0 : FLOAT32_IN0;
    const uint32_t in1 = flags & IN1_BFLOAT16 ? BFLOAT16_IN1 : FLOAT32_IN1;
    const uint32_t out = flags & OUT_BFLOAT16 ? BFLOAT16_OUT : FLOAT32_OUT;
    const uint32_t transposed = flags & TRANSPOSED ? 1 : 0;

    reconfig_data_format<SrcOrder::Reverse>(in0, in1);
    matmul_init(in0, in1, transposed);
    standing.loaded = NO_WINDOW;
    set_up_store(out, standing);
    read_from(in0, words[1]);
    read_from(in1, words[2]);
    write_to(out, words[0]);

    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t first = 0; first < columns; first += MOST_TILES) {
            const uint32_t width = columns - first < MOST_TILES ? columns - first : MOST_TILES;
            tile_regs_acquire();
            for (uint32_t k = 0; k < inner; ++k) {
                for (uint32_t j = 0; j < width; ++j) {
                    matmul_tiles(
                        in0, in1, row * inner + k, k * inner_step + (first + j) * column_step, j);
                    COUNT(products);
                }
            }
            tile_regs_commit();
            tile_regs_wait();
            for (uint32_t j = 0; j < width; ++j) {
                pack_tile<true>(j, out, row * columns + first + j);
            }
            tile_regs_release();
        }
    }
}

ALWI void transpose(Words words, Standing& standing) {
    const uint32_t rows = words[2] & 0xff, columns = words[2] >> 8;
    const uint32_t in = words[3] ? BFLOAT16_IN0 : FLOAT32_TO_DEST;
    const uint32_t out = words[3] ? BFLOAT16_OUT : FLOAT32_OUT;

    reconfig_data_format_srca(in);
    transpose_init(in);
    standing.loaded = NO_WINDOW;
    set_up_store(out, standing);
    read_from(in, words[1]);
    write_to(out, words[0]);
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t column = 0; column < columns; ++column) {
            tile_regs_acquire();
            transpose_tile(in, row * columns + column, 0);
            tile_regs_commit();
            tile_regs_wait();
            pack_tile<true>(0, out, column * rows + row);
            tile_regs_release();
        }
    }
}

// --- functions of one register, by name; each apart, so that their registers are -----------------------------

#define FUNCTION(name) __attribute__((noinline)) void apply_##name(uint32_t tile, [[maybe_unused]] Words parameters)

FUNCTION(round_to_bfloat16) {
    typecast_tile_init<FLOAT32, BFLOAT16>();
    typecast_tile<FLOAT32, BFLOAT16>(tile);
}

FUNCTION(scale) {
    binop_with_scalar_tile_init();
    mul_unary_tile(tile, get_common_arg_val<uint32_t>(NUMBERS + parameters[0]));
}

FUNCTION(shift) {
    binop_with_scalar_tile_init();
    add_unary_tile(tile, get_common_arg_val<uint32_t>(NUMBERS + parameters[0]));
}

FUNCTION(sum_rows) {
    sfpu_reduce_init<PoolType::SUM, DataFormat::Float32>();
    sfpu_reduce<PoolType::SUM, DataFormat::Float32, ReduceDim::REDUCE_COL>(tile);
}

FUNCTION(fill) {
    fill_tile_init();
    fill_tile_bitcast(tile, parameters[0]);
}

FUNCTION(add_constant) {
    binop_with_scalar_tile_init();
    add_unary_tile(tile, parameters[0]);
}

FUNCTION(multiply_constant) {
    binop_with_scalar_tile_init();
    mul_unary_tile(tile, parameters[0]);
}

FUNCTION(subtract_from) {
    binop_with_scalar_tile_init();
    rsub_unary_tile(tile, parameters[0]);
}

FUNCTION(tanh) {
    tanh_tile_init();
    tanh_tile(tile);
}

FUNCTION(sigmoid) {
    sigmoid_tile_init();
    sigmoid_tile(tile);
}

FUNCTION(relu) {
    relu_tile_init();
    relu_tile(tile);
}

FUNCTION(leaky_relu) {
    leaky_relu_tile_init();
    leaky_relu_tile(tile, parameters[0]);
}

FUNCTION(square) {
    square_tile_init();
    square_tile(tile);
}

FUNCTION(above_zero) {
    gtz_tile_init();
    gtz_tile(tile);
}

FUNCTION(silu) {
    silu_tile_init();
    silu_tile(tile);
}

FUNCTION(erf) {
    erf_tile_init<false>();
    erf_tile<false>(tile);
}

FUNCTION(exp) {
    exp_tile_init<false>();
    exp_tile<false>(tile);
}

FUNCTION(sqrt) {
    sqrt_tile_init();
    sqrt_tile(tile);
}

FUNCTION(reciprocal) {
    recip_tile_init();
    recip_tile(tile);
}

FUNCTION(clamp) {
    clamp_tile_init();
    clamp_tile(tile, parameters[0], parameters[1]);
}

FUNCTION(number) {
    fill_tile_init();
    fill_tile_bitcast(tile, get_common_arg_val<uint32_t>(NUMBERS + parameters[0]));
}

__attribute__((noinline)) void add(uint32_t first, uint32_t second, uint32_t result) {
    add_binary_tile_init();
    add_binary_tile(first, second, result);
}

__attribute__((noinline)) void subtract(uint32_t first, uint32_t second, uint32_t result) {
    sub_binary_tile_init();
    sub_binary_tile(first, second, result);
}

__attribute__((noinline)) void multiply(uint32_t first, uint32_t second, uint32_t result) {
    mul_binary_tile_init();
    mul_binary_tile(first, second, result);
}

__attribute__((noinline)) void add_product(uint32_t first, uint32_t second, uint32_t flags) {
    addcmul_tile_init();
    addcmul_tile<DataFormat::Float32>(first, second, flags & 0xf, flags >> 4, ONE);
}

__attribute__((noinline)) void copy(uint32_t first, uint32_t second) {
    copy_dest_values_init();
    copy_dest_values<DataFormat::Float32>(first, second);
}

// Returns how many parameters the function had.
ALWI uint32_t apply(uint32_t kind, uint32_t tile, Words parameters) {
    switch (kind) {
        case ROUND: apply_round_to_bfloat16(tile, parameters); return 0;
        case SCALE: apply_scale(tile, parameters); return 1;
        case SHIFT: apply_shift(tile, parameters); return 1;
        case SUM_ROWS: apply_sum_rows(tile, parameters); return 0;
        case FILL: apply_fill(tile, parameters); return 1;
        case NUMBER: apply_number(tile, parameters); return 1;
        case ADD_CONSTANT: apply_add_constant(tile, parameters); return 1;
        case MULTIPLY_CONSTANT: apply_multiply_constant(tile, parameters); return 1;
        case SUBTRACT_FROM: apply_subtract_from(tile, parameters); return 1;
        case TANH: apply_tanh(tile, parameters); return 0;
        case SIGMOID: apply_sigmoid(tile, parameters); return 0;
        case RELU: apply_relu(tile, parameters); return 0;
        case LEAKY_RELU: apply_leaky_relu(tile, parameters); return 1;
        case SQUARE: apply_square(tile, parameters); return 0;
        case ABOVE_ZERO: apply_above_zero(tile, parameters); return 0;
        case SILU: apply_silu(tile, parameters); return 0;
        case ERF: apply_erf(tile, parameters); return 0;
        case EXP: apply_exp(tile, parameters); return 0;
        case SQRT: apply_sqrt(tile, parameters); return 0;
        case RECIPROCAL: apply_reciprocal(tile, parameters); return 0;
        case CLAMP: apply_clamp(tile, parameters); return 2;
    }
    return 0;
}

// Returns the words that the instruction took.
ALWI uint32_t elementwise(Words words, Standing& standing, [[maybe_unused]] Work& work) {
    const uint32_t tiles = words[0];
    uint32_t at = 1;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        at = 1;
        tile_regs_acquire();
        for (;;) {
            const uint32_t word = words[at++];
            const uint32_t kind = word & 0xff, first = (word >> 8) & 0xf, second = (word >> 12) & 0xf;
            const uint32_t flags = word >> 16;
            if (kind == STOP) {
                break;
            }
            COUNT(links);
            switch (kind) {
                case LOAD: {
                    const uint32_t in = flags & 1 ? BFLOAT16_IN0 : FLOAT32_TO_DEST;
                    const uint32_t period = flags >> 1;
                    set_up_load(in, standing);
                    read_from(in, words[at++]);
                    copy_tile(in, period > 0 ? tile % period : tile, first);
                    break;
                }
                case KEEP:
                    tile_regs_commit();
                    tile_regs_wait();
                    break;
                case STORE: {
                    const uint32_t out = flags ? BFLOAT16_OUT : FLOAT32_OUT;
                    set_up_store(out, standing);
                    write_to(out, words[at++]);
                    pack_tile<true>(first, out, tile);
                    break;
                }
                case ADD: add(first, second, flags); break;
                case SUBTRACT: subtract(first, second, flags); break;
                case MULTIPLY: multiply(first, second, flags); break;
                case ADD_PRODUCT: add_product(first, second, flags); break;
                case COPY: copy(first, second); break;
                default: at += apply(kind, first, words + at);
            }
        }
        tile_regs_release();
    }
    return at;
}

void kernel_main() {
    const uint32_t table = get_common_arg_val<uint32_t>(TABLE_ADDRESS);
    const uint32_t num_segments = get_common_arg_val<uint32_t>(NUM_SEGMENTS);
    auto words = reinterpret_cast<Words>(table);
    compute_kernel_hw_startup<SrcOrder::Reverse>(BFLOAT16_IN0, BFLOAT16_IN1, FLOAT32_OUT);
    Standing standing;
    [[maybe_unused]] Work work;

    for (uint32_t segment = 0; segment < num_segments; ++segment) {
        const uint32_t section = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment);
        uint32_t times = get_common_arg_val<uint32_t>(SEGMENTS + 2 * segment + 1);
        const uint32_t begin = words[3 * section + COMPUTE];
        for (; times > 0; --times) {
            for (uint32_t at = begin;;) {
                const uint32_t word = words[at++];
                const uint32_t code = word & 0xff, done = (word >> 9) & 0xffff;
                if (word & 0x100) {
                    cb_wait_front(GO, 1);
                    cb_pop_front(GO, 1);
                }
                if (done > 0) {
                    cb_wait_front(DONE, done);
                    cb_pop_front(DONE, done);
                }
                if (code == END) {
                    break;
                }
                switch (code) {
                    case NOTHING: break;
                    case PRODUCT:
                        product(words + at, standing, work);
                        at += 6;
                        break;
                    case TRANSPOSE:
                        transpose(words + at, standing);
                        at += 4;
                        break;
                    default: at += elementwise(words + at, standing, work);
                }
                COUNT(instructions);
                cb_push_back(DONE, 1);
                if (word & 0x2000000) {
                    cb_push_back(SEND, 1);
                }
            }
        }
    }
#ifdef COUNT_WORK
    UNPACK({
        auto counts = reinterpret_cast<Words>(
            get_common_arg_val<uint32_t>(MAILBOX_ADDRESS) + WORK_COUNTER * COUNTER_BYTES);
        counts[0] = counts[0] + work.products;
        counts[1] = counts[1] + work.links;
        counts[2] = counts[2] + work.instructions;
    })
#endif
}
