/* The selected experts of a layer on their tokens, as an indirect matrix product.
 *
 * fc1 reads the rows of x by pointer and writes the hidden rows of an expert beside each other; fc2
 * adds an expert's rows to sums that lie where the output will. Nothing as wide as x is gathered,
 * stored or scattered for a (token, expert) pair.
 *
 * A row's arithmetic does not depend on other rows: its products are added in order of k (two by
 * two, if they are made in pairs), and its experts in order of e. So the bits depend neither on the
 * number of threads nor on the batch.
 *
 * After ReLU most hidden values are 0. Where enough of them are, fc2 leaves their products out: what
 * it adds up stays the same, and so does its order.
 *
 * Experts too small to fill a register, or a tile of pairs, are packed beside each other as one: a
 * token that runs one of these members computes all, and the hidden values of the others are set to
 * 0. So `experts` of a Layer counts what is packed as one; that of a Router, of scores and of
 * `dmoe_zero` counts the model's own, and a mask has a column for each of those.
 *
 * Packed weights (see native.py). A panel is `columns` output columns beside each other, padded
 * with zeros: w1 (E, panels of D, C, columns), w2 (panels of C, E, D, columns).
 *
 * bfloat16 is multiplied in pairs where the processor can, by AMX or by AVX-512's dot products. Else
 * it is multiplied as float32, in which weights are packed and to which tokens are widened. For pairs
 * panels hold pairs of rows, (..., depth / 2, columns, 2), the depth padded to whole tiles.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif
#ifdef _OPENMP
extern int omp_get_thread_num(void); /* its header belongs to the compiler's library, not torch's */
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6 };
#else /* NEON's registers; other processors make of it what they can */
enum { LANES = 4, ROWS = 8 };
#endif
/* A tile is ROWS rows by VECTORS registers: its sums, a row of weights and a factor of each row
 * have to fit in the registers. */
enum { VECTORS = 2 };
enum { ALONE = 8000000 }; /* operations up to which one thread is done before others are awake */
enum { FEW_SCORES = 1 << 15 }; /* scores up to which one thread compares them, likewise */
enum { CHUNK = 2048 }; /* tokens of one pass: bounds the hidden buffer */
enum { RANGE = 256 };  /* tokens of one task, and */
enum { BLOCK = 64 };   /* its columns: weights and sums stay in the second cache */
enum { SPARSE = LANES == 16 ? 50 : 75 }; /* percent of a row up to which it pays to skip zeros */
enum { PANELS = BLOCK / (VECTORS * LANES) }; /* of fc2 in a block */
enum { TOGETHER = LANES == 16 ? 2 : 1 }; /* rows whose sums of a block fit in the registers */
enum { TILE_ROWS = 32, TILE_COLUMNS = 32, TILE_DEPTH = 32 }; /* of pairs: AMX's two by two tiles */
enum { WIDE = 4 }; /* panels of fc1 in pairs for which rows are gathered once */
enum { STRETCH = 32 };    /* steps of a product for each of which memory is asked for more */
enum { CACHE_LINE = 64 }; /* bytes that memory gives at once */
enum { WIDENED, DOT, AMX }; /* how bfloat16 is multiplied */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
#define INLINE static inline __attribute__((always_inline))
#define APART __attribute__((noinline)) /* within a large function its sums leave the registers */

INLINE vec load_float(const float *at) {
    vec value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store_float(float *at, vec value) { memcpy(at, &value, sizeof value); }

/* bfloat16 is the upper half of a float. */
INLINE uint32_t rounded_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return bits | 0x400000;
    return bits + 0x7fff + (bits >> 16 & 1);
}

/* To the nearest bfloat16, ties to even. */
INLINE vec rounded(vec value) {
    words bits = (words)value, nan = (words)(value != value);
    words near = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return (vec)((nan & (bits | 0x400000)) | (~nan & near));
}

/* Floats as bfloat16. */
INLINE void store_half(uint16_t *at, vec value) {
    halves upper = __builtin_convertvector((words)rounded(value) >> 16, halves);
    memcpy(at, &upper, sizeof upper);
}

static int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* What is read after this, and lies in no cache. The weights of a layer pass by once for each RANGE
 * of tokens, and waiting for them would take as long as a tenth of all products. */
typedef struct {
    const char *at, *end;
    size_t lines; /* of each call of `fetch` */
} Ahead;

/* All of it, in so many calls; none of it if there is nothing to come. */
static Ahead ahead_of(const char *at, int64_t bytes, int64_t calls) {
    if (!at || !calls) return (Ahead){0};
    return (Ahead){at, at + bytes, (size_t)up(up(bytes, CACHE_LINE), calls)};
}

INLINE void fetch(Ahead *ahead) {
    const char *at = ahead->at;
    for (size_t i = 0; i < ahead->lines && at < ahead->end; i++, at += CACHE_LINE)
        __builtin_prefetch(at);
    ahead->at = at;
}

/* sums[r][v] += sum over k of rows[r][k] * weights[k][v] */
INLINE void multiply(const int num_rows, const int vectors, vec sums[][VECTORS],
                     const float *const *rows, const float *weights, size_t depth, Ahead *ahead) {
    const float *row[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++) row[r] = rows[r];
    const size_t stretch = ahead ? STRETCH : depth;
    for (size_t begin = 0; begin < depth; begin += stretch) {
        size_t end = begin + stretch < depth ? begin + stretch : depth;
        if (ahead) fetch(ahead);
        for (size_t k = begin; k < end; k++) {
            vec weight[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                weight[v] = load_float(weights + (k * vectors + v) * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sums[r][v] += row[r][k] * weight[v];
        }
    }
}

/* A tile of fc1: relu(x W1 + b1), stored as floats of the precision of x. */
INLINE void fc1_tile(const int num_rows, const int vectors, int64_t half, const float *const *x,
                     const float *weights, const float *bias, size_t width, float *hidden,
                     size_t stride, Ahead *ahead) {
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = load_float(bias + v * LANES);
    multiply(num_rows, vectors, sums, x, weights, width, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vec value = (vec)((words)sums[r][v] & ~(words)(sums[r][v] < 0)); /* keeps NaN */
            if (half) value = rounded(value);
            store_float(hidden + r * stride + v * LANES, value);
        }
}

/* A tile of fc2: the sums of some tokens, a panel wide, plus an expert's share. */
INLINE void fc2_tile(const int num_rows, const float *hidden, size_t stride, const float *weights,
                     size_t depth, float *const *out, Ahead *ahead) {
    const float *rows[ROWS];
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++) {
        rows[r] = hidden + r * stride;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = load_float(out[r] + v * LANES);
    }
    multiply(num_rows, VECTORS, sums, rows, weights, depth, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store_float(out[r] + v * LANES, sums[r][v]);
}

/* Which values are not 0, a bit each. */
INLINE uint64_t active(vec value) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX__)
    __m256 differs = _mm256_cmp_ps((__m256)value, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return (uint64_t)_mm256_movemask_ps(differs);
#else
    uint64_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint64_t)(value[i] != 0) << i;
    return bits;
#endif
}

/* sums (a block) += hidden[k] * row k of the weights, whose panels lie `step` bytes apart. */
INLINE void add_row(vec *sums, const float *hidden, const char *weights, size_t k, size_t step) {
    const float value = hidden[k];
    const char *panel = weights + k * sizeof(vec[VECTORS]);
#pragma GCC unroll 16
    for (int first = 0; first < BLOCK / LANES; first += VECTORS, panel += step)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[first + v] += value * load_float((const float *)panel + v * LANES);
}

/* As fc2_tile, a block wide, of the hidden values whose bits are set: of two rows at once, whose
 * sums wait for each other less. The shorter one goes on with a value that is 0, so that the end of
 * both is one branch that is guessed wrong, and not three. */
INLINE void fc2_active(const int num_rows, const float *hidden, size_t stride, const uint64_t *bits,
                       size_t words, const char *weights, size_t step, float *const *out,
                       Ahead *ahead) {
    vec sums[TOGETHER][BLOCK / LANES];
#pragma GCC unroll 2
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < BLOCK / LANES; v++) sums[r][v] = load_float(out[r] + v * LANES);
    for (size_t word = 0; word < words; word++) {
        if (ahead->lines) {
            for (int panel = 1; panel < PANELS; panel++) {
                Ahead its = {ahead->at + panel * step, ahead->end + panel * step, ahead->lines};
                fetch(&its);
            }
            fetch(ahead);
        }
        uint64_t left = bits[word], other = num_rows == 2 ? bits[words + word] : 0;
        const uint64_t zero = ~left & (left + 1), other_zero = ~other & (other + 1);
        const int count = __builtin_popcountll(left), others = __builtin_popcountll(other);
        for (int i = count > others ? count : others; i > 0; i--) {
            if (num_rows == 2) {
                left = left ? left : zero;
                other = other ? other : other_zero;
                add_row(sums[num_rows - 1], hidden + stride, weights,
                        (size_t)__builtin_ctzll(other), step);
                other &= other - 1;
            }
            add_row(sums[0], hidden, weights, (size_t)__builtin_ctzll(left), step);
            left &= left - 1;
        }
        hidden += 64;
        weights += 64 * sizeof(vec[VECTORS]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < BLOCK / LANES; v++) store_float(out[r] + v * LANES, sums[r][v]);
}

/* One compiled tile for each number of rows: a loop of unknown length would push the sums out of
 * the registers. */
#define EACH_NUMBER_OF_ROWS(call) \
    switch (num_rows) {           \
    case 1: call(1); break;       \
    case 2: call(2); break;       \
    case 3: call(3); break;       \
    case 4: call(4); break;       \
    case 5: call(5); break;       \
    case 6: call(6); break;       \
    case 7: call(ROWS < 7 ? ROWS : 7); break; \
    default: call(ROWS); break;   \
    }

/* Tiles for which nothing is to be asked for have one loop, in fewer registers. */
#define EACH_WITH_OR_WITHOUT_AHEAD(call) \
    if (ahead->lines) {                  \
        EACH_NUMBER_OF_ROWS(call)        \
    } else {                             \
        Ahead *const ahead = NULL;       \
        EACH_NUMBER_OF_ROWS(call)        \
    }

typedef struct {
    int64_t width, experts, size;
    int64_t members;          /* experts of the model in one of these */
    int64_t vectors;          /* registers of a panel of fc1 */
    int64_t half;             /* tokens and outputs are bfloat16, else float32 */
    int64_t pairs;            /* DOT or AMX, if bfloat16 is multiplied in pairs */
    int64_t finite;           /* whether 0 times a weight of fc2 is 0 */
    int64_t streamed;         /* whether the weights are too many for a cache to keep */
    const void *w1, *w2;      /* packed */
    const float *b1, *b2;     /* padded like the packed columns */
} Layer;

static void fc1_rows(const Layer *layer, int num_rows, const float *const *x, const float *weights,
                     const float *bias, float *hidden, size_t stride, Ahead *ahead) {
#define TILE(n) \
    fc1_tile(n, vectors, layer->half, x, weights, bias, layer->width, hidden, stride, ahead)
    if (layer->vectors == 1) {
        enum { vectors = 1 };
        EACH_WITH_OR_WITHOUT_AHEAD(TILE)
    } else {
        enum { vectors = VECTORS };
        EACH_WITH_OR_WITHOUT_AHEAD(TILE)
    }
#undef TILE
}

static void fc2_rows(const Layer *layer, int num_rows, const float *hidden, size_t stride,
                     const float *weights, float *const *out, Ahead *ahead) {
#define TILE(n) fc2_tile(n, hidden, stride, weights, layer->size, out, ahead)
    EACH_WITH_OR_WITHOUT_AHEAD(TILE)
#undef TILE
}

/* Where things lie in the workspace, for up to `tokens` of them. */
typedef struct {
    int64_t *starts;  /* (ranges + 1, E): where the rows of an expert begin that lie in a range */
    int32_t *rows;    /* (pairs): tokens, by expert, ascending */
    const uint8_t *mask; /* (tokens, E, members), the caller's */
    float *hidden;    /* (pairs, padded D); in pairs (rows + a tile, padded D), bfloat16 */
    uint64_t *active; /* (pairs, blocks of D): bits of the hidden values that are not 0 */
    float *x;         /* (tokens, C), of bfloat16 that is widened */
    float *sums;      /* (threads, RANGE, BLOCK) */
    int64_t bytes;
} Space;

static int64_t take(int64_t *used, int64_t bytes) {
    int64_t start = *used;
    *used += up(bytes, 64) * 64;
    return start;
}

static Space space(const Layer *layer, int64_t tokens, int threads, char *memory) {
    int64_t chunk = least(tokens, CHUNK), pairs = chunk * layer->experts, used = 0;
    int64_t padded = up(layer->size, layer->vectors * LANES) * layer->vectors * LANES;
    Space s;
    s.starts = (int64_t *)(memory + take(&used, (up(chunk, RANGE) + 1) * layer->experts * 8));
    s.rows = (int32_t *)(memory + take(&used, (pairs + 1) * 4));
    s.sums = (float *)(memory + take(&used, (int64_t)threads * RANGE * BLOCK * 4));
    int64_t x_bytes = layer->half && !layer->pairs ? chunk * layer->width * 4 : 0;
    int64_t hidden_bytes = pairs * padded * 4;
    if (layer->pairs)
        hidden_bytes = (pairs + TILE_ROWS) * up(layer->size, TILE_DEPTH) * TILE_DEPTH * 2;
    s.active = (uint64_t *)(memory + take(&used, pairs * up(layer->size, BLOCK) * 8));
    s.x = (float *)(memory + take(&used, x_bytes));
    s.hidden = (float *)(memory + take(&used, hidden_bytes));
    s.bytes = used;
    return s;
}

/* The row lists of a chunk's mask: starts and rows. */
static void list_rows(const Layer *layer, int64_t tokens, const Space *s) {
    int64_t experts = layer->experts, members = layer->members;
    int64_t ranges = up(tokens, RANGE), end = 0;
    for (int64_t e = 0; e < experts; e++)
        for (int64_t range = 0; range <= ranges; range++) {
            s->starts[range * experts + e] = end;
            for (int64_t t = range * RANGE; t < least(tokens, (range + 1) * RANGE); t++) {
                const uint8_t *runs = s->mask + (t * experts + e) * members;
                uint8_t any = runs[0];
                for (int64_t m = 1; m < members; m++) any |= runs[m];
                s->rows[end] = (int32_t)t; /* the next overwrites it, if this one is not to run */
                end += any;
            }
        }
}

/* Zeros for the values of pairs that do not run, without a branch, which random masks mislead. */
INLINE void zero_pairs(char *hidden, const uint8_t *mask, int64_t pairs, const int64_t bytes) {
    for (int64_t pair = 0; pair < pairs; pair++) {
        uint32_t values[32], keep = -(uint32_t)mask[pair];
        memcpy(values, hidden + pair * bytes, bytes);
        for (int64_t i = 0; i < bytes / 4; i++) values[i] &= keep;
        memcpy(hidden + pair * bytes, values, bytes);
    }
}

/* Zeros for a token's hidden values of what it does not run: so many bytes each, side by side. */
static void zero_idle(char *hidden, const uint8_t *runs, int64_t number, int64_t bytes) {
    if (bytes == 16) zero_pairs(hidden, runs, number, 16);
    else if (bytes == 32) zero_pairs(hidden, runs, number, 32);
    else if (bytes == 64) zero_pairs(hidden, runs, number, 64);
    else if (bytes == 128) zero_pairs(hidden, runs, number, 128);
    else
        for (int64_t i = 0; i < number; i++)
            if (!runs[i]) memset(hidden + i * bytes, 0, bytes);
}

/* The same for the members of an expert, in the row of a pair. */
static void zero_members(const Layer *layer, const Space *s, int64_t expert, int64_t pair,
                         void *hidden, int64_t element) {
    int64_t members = layer->members;
    if (members == 1) return;
    const uint8_t *runs = s->mask + (s->rows[pair] * layer->experts + expert) * members;
    zero_idle((char *)hidden, runs, members, layer->size / members * element);
}

/* A part of fc1: the tokens of a range that an expert runs, by a block of its columns. */
typedef struct {
    int64_t expert, block;
    int64_t from, to; /* in the list of rows */
} Part;

static Part part_of(const Layer *layer, const Space *s, int64_t task, int64_t ranges,
                    int64_t blocks) {
    int64_t expert = task / (ranges * blocks), range = task / blocks % ranges;
    const int64_t *start = s->starts + range * layer->experts + expert;
    return (Part){expert, task % blocks, start[0], start[layer->experts]};
}

/* The part with other weights that a thread likely computes next, if all take those with tokens in
 * turn; one without tokens if there is none whose weights are worth asking for early. */
static Part part_after(const Layer *layer, const Space *s, int64_t task, int64_t ranges,
                       int64_t blocks, int64_t threads) {
    const Part none = {0}, part = part_of(layer, s, task, ranges, blocks);
    int64_t last = layer->experts * ranges * blocks, count = 0;
    if (!layer->streamed || part.from == part.to) return none;
    while (++task < last) {
        Part next = part_of(layer, s, task, ranges, blocks);
        int same = next.expert == part.expert && next.block == part.block;
        count += next.from < next.to;
        if (next.from < next.to && count % threads == 0 && !same) return next;
    }
    return none;
}

/* Hidden rows of a part, while the weights of the next one come from memory. */
static void fc1(const Layer *layer, const Space *s, const float *x, Part part, Part next) {
    int64_t columns = layer->vectors * LANES, panels = up(layer->size, columns);
    int64_t width = layer->width, stride = panels * columns, blocks = up(layer->size, BLOCK);
    int64_t bytes = width * columns * sizeof(float), per_block = up(BLOCK, columns);
    int64_t first = part.block * BLOCK / columns, last = least(panels, first + per_block);
    int64_t its_first = next.expert * panels + next.block * BLOCK / columns;
    int64_t calls = up(part.to - part.from, ROWS) * up(width, STRETCH);
    for (int64_t panel = first; panel < last; panel++) {
        int64_t at = part.expert * panels + panel;
        const char *w1 = (const char *)layer->w1, *weights = w1 + at * bytes;
        const char *then = next.from < next.to ? w1 + its_first * bytes : NULL;
        if (panel + 1 < last) then = weights + bytes;
        Ahead ahead = ahead_of(layer->streamed ? then : NULL, bytes, calls);
        for (int64_t p = part.from; p < part.to; p += ROWS) {
            int num_rows = (int)least(ROWS, part.to - p);
            const float *rows[ROWS];
            for (int r = 0; r < num_rows; r++) rows[r] = x + s->rows[p + r] * width;
            fc1_rows(layer, num_rows, rows, (const float *)weights, layer->b1 + at * columns,
                     s->hidden + p * stride + panel * columns, stride, &ahead);
        }
    }
    for (int64_t p = part.from; p < part.to; p++) {
        float *hidden = s->hidden + p * stride;
        uint64_t bits = 0;
        zero_members(layer, s, part.expert, p, hidden, sizeof *hidden);
        for (int64_t c = first * columns; c < last * columns; c += LANES)
            bits |= active(load_float(hidden + c)) << (c - first * columns);
        /* Padding is 0, but NaN where x is infinite; W2 has no rows for it. */
        if (layer->size - part.block * BLOCK < BLOCK)
            bits &= ((uint64_t)1 << (layer->size - part.block * BLOCK)) - 1;
        s->active[p * blocks + part.block] = bits;
    }
}

/* The finished sums of some tokens, rounded where the output is. */
static void write_out(const Layer *layer, const float *sums, int64_t columns, int64_t start,
                      int64_t end, int64_t first, char *out) {
    int64_t element = layer->half ? 2 : 4;
    int64_t kept = least(columns, layer->width - first); /* without the zeros that fill it up */
    for (int64_t t = start; t < end; t++) {
        const float *row = sums + (t - start) * columns;
        char *to = out + (t * layer->width + first) * element;
        for (int64_t c = 0; c < columns; c += LANES) /* rows lie far from each other */
            __builtin_prefetch(to + 8 * layer->width * element + c * element, 1);
        if (!layer->half) {
            memcpy(to, row, kept * sizeof *row);
            continue;
        }
        int64_t c = 0;
        for (; c + LANES <= kept; c += LANES)
            store_half((uint16_t *)to + c, load_float(row + c));
        for (; c < kept; c++) {
            uint16_t upper = (uint16_t)(rounded_bits(row[c]) >> 16);
            memcpy(to + 2 * c, &upper, sizeof upper);
        }
    }
}

/* Whether it is faster to leave out the hidden values that are 0. */
static int is_sparse(const Layer *layer, const uint64_t *bits, int num_rows) {
    int64_t count = 0, blocks = up(layer->size, BLOCK);
    for (int64_t i = 0; i < num_rows * blocks; i++) count += __builtin_popcountll(bits[i]);
    return layer->finite && 100 * count <= SPARSE * num_rows * layer->size;
}

/* Rows of one expert, without the products of 0. `ahead` is of the first panel. */
APART static void fc2_sparse(const Layer *layer, int num_rows, const float *hidden, size_t stride,
                             const uint64_t *bits, const char *weights, float *const *out,
                             Ahead *ahead) {
    size_t words = up(layer->size, BLOCK), step = layer->experts * layer->size * sizeof(vec[VECTORS]);
    for (int r = 0; r < num_rows; r += TOGETHER) {
        const float *rows = hidden + r * stride;
        const uint64_t *theirs = bits + r * words;
        int whole = r + TOGETHER <= num_rows;
#define ACTIVE(n) fc2_active(n, rows, stride, theirs, words, weights, step, out + r, ahead)
        whole ? ACTIVE(TOGETHER) : ACTIVE(1);
#undef ACTIVE
    }
}

/* The next expert with tokens of a range, whose weights are worth asking for early. */
static int64_t expert_after(const Layer *layer, const Space *s, int64_t e, int64_t range) {
    const int64_t *starts = s->starts + range * layer->experts;
    if (!layer->streamed) return layer->experts;
    do e++;
    while (e < layer->experts && starts[e] == starts[layer->experts + e]);
    return e;
}

/* The output of a range's tokens, for a block of its columns: b2 and each expert's share, while the
 * weights of the next expert come from memory. */
static void fc2(const Layer *layer, const Space *s, int64_t tokens, int64_t range, int64_t block,
                float *sums, char *out) {
    enum { COLUMNS = VECTORS * LANES };
    int64_t stride = up(layer->size, layer->vectors * LANES) * layer->vectors * LANES;
    int64_t width = layer->width, experts = layer->experts;
    int64_t start = range * RANGE, end = least(tokens, start + RANGE);
    int64_t first = block * PANELS, last = least(up(width, COLUMNS), first + PANELS);
    int64_t columns = (last - first) * COLUMNS, blocks = up(layer->size, BLOCK);
    int64_t bytes = layer->size * COLUMNS * sizeof(float); /* of an expert's panel */
    for (int64_t t = 0; t < end - start; t++)
        memcpy(sums + t * columns, layer->b2 + first * COLUMNS, columns * sizeof *sums);
    for (int64_t e = 0; e < experts; e++) {
        int64_t from = s->starts[range * experts + e], to = s->starts[(range + 1) * experts + e];
        if (from == to) continue;
        const char *panels[PANELS];
        Ahead dense[PANELS], sparse; /* of the next expert, by either way */
        int64_t after = expert_after(layer, s, e, range);
        for (int64_t i = 0; i < last - first; i++) {
            panels[i] = (const char *)layer->w2 + ((first + i) * experts + e) * bytes;
            const char *next = after < experts ? panels[i] + (after - e) * bytes : NULL;
            dense[i] = ahead_of(next, bytes, up(to - from, ROWS) * up(layer->size, STRETCH));
            if (i == 0) sparse = ahead_of(next, bytes, up(to - from, TOGETHER) * blocks);
        }
        for (int64_t p = from; p < to; p += ROWS) {
            int num_rows = (int)least(ROWS, to - p);
            float *rows[ROWS];
            for (int r = 0; r < num_rows; r++) rows[r] = sums + (s->rows[p + r] - start) * columns;
            if (columns == BLOCK && is_sparse(layer, s->active + p * blocks, num_rows)) {
                fc2_sparse(layer, num_rows, s->hidden + p * stride, stride, s->active + p * blocks,
                           panels[0], rows, &sparse);
                continue;
            }
            for (int64_t i = 0; i < last - first; i++) {
                fc2_rows(layer, num_rows, s->hidden + p * stride, stride, (const float *)panels[i],
                         rows, dense + i);
                for (int r = 0; r < num_rows; r++) rows[r] += COLUMNS;
            }
        }
    }
    write_out(layer, sums, columns, start, end, first * COLUMNS, out);
}

#if HAS_AMX || HAS_DOT
#if HAS_AMX
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

/* Tiles 0 to 3 hold sums, two by two; 4 and 5 rows of the left factor, 6 and 7 of the right one. */
static void tiles_on(void) {
    Tiles config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}

INLINE void multiply_tiles(const char *rows, int64_t stride, const char *weights, int64_t steps,
                           const int add, float *sums, Ahead *ahead) {
    float *below = sums + 16 * TILE_COLUMNS;
    if (add) {
        _tile_loadd(0, sums, TILE_COLUMNS * 4);
        _tile_loadd(1, sums + 16, TILE_COLUMNS * 4);
        _tile_loadd(2, below, TILE_COLUMNS * 4);
        _tile_loadd(3, below + 16, TILE_COLUMNS * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        fetch(ahead);
        _tile_loadd(4, rows, stride);
        _tile_loadd(6, weights, TILE_COLUMNS * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + 64, TILE_COLUMNS * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, rows + 16 * stride, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        rows += TILE_DEPTH * 2;
        weights += TILE_DEPTH * TILE_COLUMNS * 2;
    }
    _tile_stored(0, sums, TILE_COLUMNS * 4);
    _tile_stored(1, sums + 16, TILE_COLUMNS * 4);
    _tile_stored(2, below, TILE_COLUMNS * 4);
    _tile_stored(3, below + 16, TILE_COLUMNS * 4);
}
#endif

#if HAS_DOT
INLINE void dot_tile(const int num_rows, const char *rows, int64_t stride, const char *weights,
                     int64_t pairs, const int add, float *const *sums, Ahead *ahead) {
    __m512 sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            sum[r][v] = add ? _mm512_loadu_ps(sums[r] + 16 * v) : _mm512_setzero_ps();
    const int64_t stretch = ahead ? STRETCH : pairs;
    for (int64_t begin = 0; begin < pairs; begin += stretch) {
        int64_t end = least(begin + stretch, pairs);
        if (ahead) fetch(ahead);
        for (int64_t k = begin; k < end; k++) {
            __m512bh weight[2];
            memcpy(weight, weights + k * sizeof weight, sizeof weight);
#pragma GCC unroll 16
            for (int r = 0; r < num_rows; r++) {
                int32_t pair;
                memcpy(&pair, rows + r * stride + k * sizeof pair, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++)
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, weight[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(sums[r] + 16 * v, sum[r][v]);
}

/* A panel of sums, which lie anywhere: their values, or 0, and the products of `left` rows. */
static void multiply_dots(int64_t left, const void *rows, int64_t stride, const char *weights,
                          int64_t steps, const int add, float *const *sums, Ahead *ahead) {
    const char *at = (const char *)rows;
    for (; left > 0; left -= ROWS, at += ROWS * stride, sums += ROWS) {
        int num_rows = (int)least(ROWS, left);
#define TILE(n) dot_tile(n, at, stride, weights, steps * TILE_DEPTH / 2, add, sums, ahead)
        EACH_WITH_OR_WITHOUT_AHEAD(TILE)
#undef TILE
    }
}
#endif

/* sums += the products of some rows, `stride` bytes apart, with a panel: of rows that lie anywhere.
 * AMX multiplies whole tiles, whatever lies in the rows that are not asked for. */
INLINE void add_pairs(const Layer *layer, int64_t num_rows, const void *rows, int64_t stride,
                      const char *weights, int64_t steps, float *const *sums, Ahead *ahead) {
#if HAS_AMX
    if (layer->pairs == AMX) {
        float tile[TILE_ROWS * TILE_COLUMNS] __attribute__((aligned(64)));
        multiply_tiles((const char *)rows, stride, weights, steps, 0, tile, ahead);
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t c = 0; c < TILE_COLUMNS; c += LANES)
                store_float(sums[r] + c,
                            load_float(sums[r] + c) + load_float(tile + r * TILE_COLUMNS + c));
        return;
    }
#endif
#if HAS_DOT
    multiply_dots(num_rows, rows, stride, weights, steps, 1, sums, ahead);
#endif
    (void)layer;
}

/* Calls of `fetch` by the products of some rows with a panel. */
static int64_t calls_of_pairs(const Layer *layer, int64_t num_rows, int64_t steps) {
    if (layer->pairs == AMX) return up(num_rows, TILE_ROWS) * steps;
    return up(num_rows, ROWS) * up(steps * TILE_DEPTH / 2, STRETCH);
}

/* A tile of sums (TILE_ROWS, TILE_COLUMNS), or what is added to it. */
INLINE void fill_tile(const Layer *layer, int64_t num_rows, const void *rows, int64_t stride,
                      const char *weights, int64_t steps, const int add, float *tile,
                      Ahead *ahead) {
#if HAS_AMX
    if (layer->pairs == AMX) {
        multiply_tiles((const char *)rows, stride, weights, steps, add, tile, ahead);
        return;
    }
#endif
#if HAS_DOT
    float *sums[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) sums[r] = tile + r * TILE_COLUMNS;
    multiply_dots(num_rows, rows, stride, weights, steps, add, sums, ahead);
#endif
    (void)layer, (void)num_rows;
}

/* `depth` values of some rows of x from `first` on, filled up with zeros to whole tiles. */
static void gather(const uint16_t *x, int64_t width, const int32_t *tokens, int64_t num_rows,
                   int64_t first, int64_t depth, uint16_t *gathered, int64_t stride) {
    enum { AHEAD = 4 }; /* rows, which lie where no processor guesses */
    int64_t kept = least(depth, width - first);
    for (int64_t r = 0; r < num_rows; r++) {
        const uint16_t *next = x + tokens[least(r + AHEAD, num_rows - 1)] * width + first;
        for (int64_t k = 0; k < kept; k += TILE_DEPTH) __builtin_prefetch(next + k);
        uint16_t *to = gathered + r * stride;
        memcpy(to, x + tokens[r] * width + first, kept * 2);
        memset(to + kept, 0, (depth - kept) * 2);
    }
}

/* As fc1, for WIDE columns: the rows of x pass by in pieces, that stay in the first cache for all
 * panels. */
static void fc1_pairs(const Layer *layer, const Space *s, const uint16_t *x, Part part,
                      Part next) {
    enum { DEPTH = 512, STRIDE = DEPTH + 32 }; /* a line more: rows lie in all sets of the cache */
    int64_t width = layer->width, steps = up(width, TILE_DEPTH), begin = part.block * WIDE;
    int64_t panels = up(layer->size, TILE_COLUMNS), count = least(panels - begin, WIDE);
    int64_t stride = panels * TILE_COLUMNS;
    const int64_t panel_bytes = steps * TILE_DEPTH * TILE_COLUMNS * 2;
    const char *w1 = (const char *)layer->w1;
    const char *weights = w1 + (part.expert * panels + begin) * panel_bytes;
    const char *then = w1 + (next.expert * panels + next.block * WIDE) * panel_bytes;
    Ahead ahead = ahead_of(next.from < next.to ? then : NULL,
                           least(panels - next.block * WIDE, WIDE) * panel_bytes,
                           count * calls_of_pairs(layer, part.to - part.from, steps));
    const float *bias = layer->b1 + (part.expert * panels + begin) * TILE_COLUMNS;
    uint16_t gathered[TILE_ROWS * STRIDE] __attribute__((aligned(64)));
    float sums[WIDE][TILE_ROWS * TILE_COLUMNS] __attribute__((aligned(64)));
    for (int64_t p = part.from; p < part.to; p += TILE_ROWS) {
        int64_t num_rows = least(TILE_ROWS, part.to - p);
        for (int64_t first = 0; first < steps * TILE_DEPTH; first += DEPTH) {
            int64_t depth = least(DEPTH, steps * TILE_DEPTH - first);
            gather(x, width, s->rows + p, num_rows, first, depth, gathered, STRIDE);
            for (int64_t panel = 0; panel < count; panel++) {
                const char *at = weights + panel * panel_bytes;
                at += first * TILE_COLUMNS * 2;
#define PIECE(add)                                                                             \
    fill_tile(layer, num_rows, gathered, STRIDE * 2, at, depth / TILE_DEPTH, add, sums[panel], \
              &ahead)
                if (first == 0) PIECE(0);
                else PIECE(1);
#undef PIECE
            }
        }
        for (int64_t r = 0; r < num_rows; r++) {
            uint16_t *at = (uint16_t *)s->hidden + (p + r) * stride + begin * TILE_COLUMNS;
            for (int64_t c = 0; c < count * TILE_COLUMNS; c += LANES) {
                const float *from = sums[c / TILE_COLUMNS] + r * TILE_COLUMNS + c % TILE_COLUMNS;
                vec value = load_float(from) + load_float(bias + c);
                store_half(at + c, (vec)((words)value & ~(words)(value < 0)));
            }
            if (begin + count == panels) /* padding is 0, but NaN where x is infinite */
                memset(at + layer->size - begin * TILE_COLUMNS, 0, (stride - layer->size) * 2);
            zero_members(layer, s, part.expert, p + r, at, sizeof *at);
        }
    }
}

/* As fc2. The last tile of an expert reads rows of the next one, and leaves their products. */
_Static_assert(PANELS * TILE_COLUMNS == BLOCK, "fc2's panels are as wide in pairs");
static void fc2_pairs(const Layer *layer, const Space *s, int64_t tokens, int64_t range,
                    int64_t block, float *sums, char *out) {
    int64_t steps = up(layer->size, TILE_DEPTH), stride = steps * TILE_DEPTH;
    int64_t experts = layer->experts, start = range * RANGE, end = least(tokens, start + RANGE);
    int64_t first = block * PANELS, last = least(up(layer->width, TILE_COLUMNS), first + PANELS);
    int64_t columns = (last - first) * TILE_COLUMNS;
    int64_t bytes = steps * TILE_DEPTH * TILE_COLUMNS * 2; /* of an expert's panel */
    for (int64_t t = 0; t < end - start; t++)
        memcpy(sums + t * columns, layer->b2 + first * TILE_COLUMNS, columns * sizeof *sums);
    for (int64_t e = 0; e < experts; e++) {
        int64_t from = s->starts[range * experts + e], to = s->starts[(range + 1) * experts + e];
        if (from == to) continue;
        const char *weights[PANELS];
        Ahead ahead[PANELS]; /* of the next expert */
        int64_t after = expert_after(layer, s, e, range);
        for (int64_t i = 0; i < last - first; i++) {
            weights[i] = (const char *)layer->w2 + ((first + i) * experts + e) * bytes;
            const char *next = after < experts ? weights[i] + (after - e) * bytes : NULL;
            ahead[i] = ahead_of(next, bytes, calls_of_pairs(layer, to - from, steps));
        }
        for (int64_t p = from; p < to; p += TILE_ROWS) {
            int64_t num_rows = least(TILE_ROWS, to - p);
            const uint16_t *rows = (const uint16_t *)s->hidden + p * stride;
            float *at[TILE_ROWS];
            for (int64_t r = 0; r < num_rows; r++) at[r] = sums + (s->rows[p + r] - start) * columns;
            for (int64_t i = 0; i < last - first; i++) {
                add_pairs(layer, num_rows, rows, stride * 2, weights[i], steps, at, ahead + i);
                for (int64_t r = 0; r < num_rows; r++) at[r] += TILE_COLUMNS;
            }
        }
    }
    write_out(layer, sums, columns, start, end, first * TILE_COLUMNS, out);
}
#endif

static void widen(const uint16_t *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* ---- the router, and Eq. 3 ---- */

typedef struct {
    int64_t width, hidden, experts;
    int64_t vectors1, vectors2; /* registers of a panel of w1 and of w2 */
    int64_t half;               /* what torch would round to bfloat16 is */
    int64_t dots;               /* whether w1 holds pairs of bfloat16, as those of experts do */
    const void *w1;             /* (panels of hidden, C, columns) */
    const float *w2;            /* (panels of E, hidden, columns) */
} Router;

INLINE vec either(words mask, vec yes, vec no) {
    return (vec)((mask & (words)yes) | (~mask & (words)no));
}

/* erf to 2e-7: x times a polynomial of x^2 / 8 - 1, fitted on [0, 4], beyond which erf is 1. */
INLINE vec error_function(vec x) {
    static const float powers[] = {
        0.000531045953f, -0.00134770432f, 0.000867495313f, -0.00116639293f, 0.00518746255f,
        -0.0099589834f,  0.0142225418f,   -0.0217537973f,  0.0330771469f,   -0.0459793806f,
        0.0598896109f,   -0.0746943504f,  0.0902080983f,   -0.107712783f,   0.131675184f,
        -0.176576182f,   0.353531003f,
    };
    const vec four = (vec){0} + 4;
    x = either((words)(x > four), four, x);
    x = either((words)(x < -four), -four, x);
    vec at = x * x * 0.125f - 1, sum = (vec){0} + powers[0];
#pragma GCC unroll 16
    for (int i = 1; i < 17; i++) sum = sum * at + powers[i];
    return sum * x;
}

/* A tile of a plain product. */
INLINE void product_tile(const int num_rows, const int vectors, const float *const *rows,
                         const float *weights, size_t depth, float *out, size_t stride) {
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = (vec){0};
    multiply(num_rows, vectors, sums, rows, weights, depth, NULL);
#pragma GCC unroll 16
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store_float(out + r * stride + v * LANES, sums[r][v]);
}

/* rows W, (num_rows, padded columns). */
static void product(int64_t panel, int num_rows, const float *const *rows, const float *weights,
                    int64_t depth, float *out, int64_t columns) {
    for (int64_t c = 0; c < columns; c += panel * LANES) {
#define TILE(n) product_tile(n, vectors, rows, weights + c * depth, depth, out + c, columns)
        if (panel == 1) {
            enum { vectors = 1 };
            EACH_NUMBER_OF_ROWS(TILE)
        } else {
            enum { vectors = VECTORS };
            EACH_NUMBER_OF_ROWS(TILE)
        }
#undef TILE
    }
}

/* Predicted norms |W2 GELU(W1 x)| of some rows, which lie beside each other. */
static void router_rows(const Router *router, int num_rows, const char *x, char *scores) {
    int64_t width = router->width;
    int64_t experts = router->experts, element = router->half ? 2 : 4;
    int64_t wide = up(router->hidden, router->vectors1 * LANES) * router->vectors1 * LANES;
    int64_t columns = up(experts, router->vectors2 * LANES) * router->vectors2 * LANES;
    float hidden[ROWS * wide], out[ROWS * columns];
    float widened[router->half && !router->dots ? ROWS * width : 1];
    const float *rows[ROWS];
    if (router->dots) {
#if HAS_DOT
        const char *w1 = (const char *)router->w1;
        Ahead none = {0};
        for (int64_t c = 0; c < wide; c += TILE_COLUMNS, w1 += width * TILE_COLUMNS * 2) {
            float *at[ROWS];
            for (int r = 0; r < num_rows; r++) at[r] = hidden + r * wide + c;
            multiply_dots(num_rows, x, width * 2, w1, width / TILE_DEPTH, 0, at, &none);
        }
#endif
    } else {
        const float *floats = router->half ? widened : (const float *)x;
        if (router->half) widen((const uint16_t *)x, widened, num_rows * width);
        for (int r = 0; r < num_rows; r++) rows[r] = floats + r * width;
        product(router->vectors1, num_rows, rows, router->w1, width, hidden, wide);
    }
    for (int64_t i = 0; i < num_rows * wide; i += LANES) {
        vec value = load_float(hidden + i);
        if (router->half) value = rounded(value);
        value = value * 0.5f * (1 + error_function(value * 0.707106781f));
        store_float(hidden + i, router->half ? rounded(value) : value);
    }
    for (int r = 0; r < num_rows; r++) rows[r] = hidden + r * wide;
    product(router->vectors2, num_rows, rows, router->w2, router->hidden, out, columns);
    for (int r = 0; r < num_rows; r++) {
        float *row = out + r * columns;
        for (int64_t e = 0; e < columns; e += LANES) { /* halves overwrite what has been read */
            vec score = (vec)((words)load_float(row + e) & 0x7fffffff);
            if (router->half) store_half((uint16_t *)row + e, score);
            else store_float(row + e, score);
        }
        memcpy(scores + r * experts * element, row, experts * element);
    }
}

/* x (N, C), scores (N, E). */
void dmoe_scores(const Router *router, const char *x, char *scores, int64_t tokens,
                 int64_t threads) {
    int64_t width = router->width, element = router->half ? 2 : 4;
    int team = 2 * tokens * width * router->hidden < ALONE ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t begin = 0; begin < tokens; begin += ROWS) {
        router_rows(router, (int)least(ROWS, tokens - begin), x + begin * width * element,
                    scores + begin * router->experts * element);
    }
}

/* The largest of a register. */
INLINE float largest(vec value) {
    float lanes[LANES];
    store_float(lanes, value);
#pragma GCC unroll 4
    for (int step = LANES / 2; step > 0; step /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < step; i++)
            lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
}

/* Eq. 3: mask (N, E) of scores >= tau * the largest; whether a score is not finite. */
int64_t dmoe_threshold(const char *scores, uint8_t *mask, int64_t tokens, int64_t experts,
                       int64_t half, float tau, int64_t threads) {
    int64_t bad = 0, padded = up(experts, LANES) * LANES;
    int team = tokens * experts <= FEW_SCORES ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team) reduction(| : bad)
    for (int64_t begin = 0; begin < tokens; begin += RANGE) {
        float row[padded];
        uint8_t runs[padded];
        words wrong = {0};
        for (int64_t t = begin; t < least(tokens, begin + RANGE); t++) {
            if (half) widen((const uint16_t *)scores + t * experts, row, experts);
            else memcpy(row, (const float *)scores + t * experts, experts * sizeof *row);
            for (int64_t e = experts; e < padded; e++) row[e] = row[0];
            vec most = load_float(row);
            for (int64_t e = 0; e < padded; e += LANES) {
                vec value = load_float(row + e);
                wrong |= (words)(((words)value & 0x7f800000) == 0x7f800000);
                most = either((words)(value > most), value, most);
            }
            vec limit = (vec){0} + largest(most) * tau;
            if (half) limit = rounded(limit);
            for (int64_t e = 0; e < padded; e += LANES) {
                words yes = (words)(load_float(row + e) >= limit) & 1;
                bytes each = __builtin_convertvector(yes, bytes);
                memcpy(runs + e, &each, sizeof each);
            }
            memcpy(mask + t * experts, runs, experts);
        }
        for (int i = 0; i < LANES; i++) bad |= wrong[i] != 0;
    }
    return bad;
}

/* ---- what native.py asks for ---- */

/* How bfloat16 is best multiplied here. For AMX the system has to let this process use it. */
int64_t dmoe_pairs(void) {
#if HAS_AMX
    if (syscall(SYS_arch_prctl, 0x1023 /* request */, 18 /* tile data */) == 0) return AMX;
#endif
    return HAS_DOT ? DOT : WIDENED;
}

int64_t dmoe_dots(void) { return HAS_DOT; }
int64_t dmoe_tile(void) { return TILE_DEPTH; }
int64_t dmoe_lanes(void) { return LANES; }
int64_t dmoe_vectors(void) { return VECTORS; }

/* Bytes of workspace that a call needs, aligned to 64. */
int64_t dmoe_workspace(const Layer *layer, int64_t tokens, int64_t threads) {
    int64_t scores_and_mask = tokens * layer->experts * layer->members * (4 + 1);
    return space(layer, tokens, (int)threads, 0).bytes + scores_and_mask;
}

/* Ask for large pages, before the memory is written to: weights and hidden rows are streamed. */
void dmoe_large_pages(char *memory, int64_t bytes) {
#ifdef __linux__
    const uintptr_t page = 1 << 12;
    uintptr_t start = ((uintptr_t)memory + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)memory + bytes) & ~(page - 1);
    if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

INLINE uint64_t mixed(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * UINT64_C(0x9E3779B97F4A7C15); /* odd: what differs goes on to differ */
    return hash ^ hash >> 29;
}

enum { PIECE = 1 << 16 };

/* A 64-bit hash of the bytes of a piece, their order and its place. Words take turns in LINE chains,
 * which registers hold side by side. */
static uint64_t hash_of(const char *at, int64_t count, int64_t piece) {
    enum { LINE = 32 };
    const char *end = at + count;
    uint64_t hashes[LINE] = {0}, words[LINE], hash = (uint64_t)piece;
    for (; end - at >= (int64_t)sizeof words; at += sizeof words) {
        memcpy(words, at, sizeof words);
        for (int i = 0; i < LINE; i++) hashes[i] = mixed(hashes[i], words[i]);
    }
    memset(words, 0, sizeof words);
    memcpy(words, at, (size_t)(end - at));
    for (int i = 0; i < LINE; i++) hash = mixed(hash, mixed(hashes[i], words[i]));
    return mixed(hash, (uint64_t)piece);
}

/* A 64-bit hash of each of several tensors' bytes and their order. */
void dmoe_fingerprints(const char *const *tensors, const int64_t *counts, uint64_t *hashes,
                       int64_t number, int64_t threads) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < number; i++) {
        hashes[i] = (uint64_t)counts[i];
        pieces += up(counts[i], PIECE);
    }
    int team = pieces < 4 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t next = 0; next < pieces; next++) {
        int64_t i = 0, piece = next;
        for (; piece >= up(counts[i], PIECE); i++) piece -= up(counts[i], PIECE);
        int64_t begin = piece * PIECE, count = least(PIECE, counts[i] - begin);
        uint64_t found = hash_of(tensors[i] + begin, count, piece);
#pragma omp atomic
        hashes[i] += found;
    }
}

/* x (N, C), mask (N, experts of the model) of 0 and 1, out (N, C); all contiguous. */
void dmoe_experts(const Layer *layer, const char *x, const uint8_t *mask, char *out, int64_t tokens,
                  int64_t threads, char *memory) {
    int64_t experts = layer->experts, width = layer->width, element = layer->half ? 2 : 4;
    Space s = space(layer, tokens, (int)threads, memory);
    int64_t blocks = up(layer->size, BLOCK), out_blocks = up(width, BLOCK);
    for (int64_t begin = 0; begin < tokens; begin += CHUNK) {
        int64_t count = least(CHUNK, tokens - begin), ranges = up(count, RANGE);
        int64_t num_fc1 = experts * ranges * blocks, num_fc2 = out_blocks * ranges;
        const char *from = x + begin * width * element;
        const float *rows = layer->half ? s.x : (const float *)from;
        s.mask = mask + begin * experts * layer->members;
        list_rows(layer, count, &s);
        int64_t pairs = s.starts[(ranges + 1) * experts - 1];
        int team = 4 * pairs * layer->size * width < ALONE ? 1 : (int)threads;
#pragma omp parallel num_threads(team)
        {
            float *sums = s.sums + (int64_t)thread_number() * RANGE * BLOCK;
            char *to = out + begin * width * element;
#if HAS_AMX || HAS_DOT
            if (layer->pairs) {
                int64_t parts = up(layer->size, WIDE * TILE_COLUMNS);
#if HAS_AMX
                Tiles before; /* another library may take its own for granted */
                if (layer->pairs == AMX) {
                    _tile_storeconfig(&before);
                    tiles_on();
                }
#endif
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < experts * ranges * parts; task++)
                    fc1_pairs(layer, &s, (const uint16_t *)from,
                              part_of(layer, &s, task, ranges, parts),
                              part_after(layer, &s, task, ranges, parts, team));
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < num_fc2; task++)
                    fc2_pairs(layer, &s, count, task % ranges, task / ranges, sums, to);
#if HAS_AMX
                if (layer->pairs == AMX) _tile_loadconfig(&before);
#endif
            }
#endif
            if (layer->half && !layer->pairs) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < count; t++)
                    widen((const uint16_t *)from + t * width, s.x + t * width, width);
            }
            if (!layer->pairs) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < num_fc1; task++)
                    fc1(layer, &s, rows, part_of(layer, &s, task, ranges, blocks),
                        part_after(layer, &s, task, ranges, blocks, team));
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < num_fc2; task++)
                    fc2(layer, &s, count, task % ranges, task / ranges, sums, to);
            }
        }
    }
}

/* Zeros for the hidden values (N, E, size) of experts that a token does not run. */
void dmoe_zero(char *hidden, const uint8_t *mask, int64_t tokens, int64_t experts, int64_t size,
               int64_t element, int64_t threads) {
    int64_t bytes = size * element, row = experts * bytes;
    int team = tokens * row < ALONE / 8 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t t = 0; t < tokens; t++) {
        zero_idle(hidden + t * row, mask + t * experts, experts, bytes);
    }
}

/* The mask of a layer's tokens: the first `selecting` choose by Eq. 3 on the router's scores, and
 * each further as many run what those do. Whether a score is not finite. tau = 0 runs every expert,
 * and no score is computed. */
static int64_t select_experts(const Router *router, const char *x, uint8_t *mask, int64_t tokens,
                              int64_t selecting, float tau, int64_t threads, char *scores) {
    int64_t experts = router->experts, count = selecting * experts;
    if (tau == 0) {
        memset(mask, 1, tokens * experts);
        return 0;
    }
    dmoe_scores(router, x, scores, selecting, threads);
    if (dmoe_threshold(scores, mask, selecting, experts, router->half, tau, threads)) return 1;
    for (int64_t at = selecting; at < tokens; at += selecting)
        memcpy(mask + at * experts, mask, count);
    return 0;
}

/* The mask alone; how many pairs run, or -1 if a score is not finite. */
int64_t dmoe_select(const Router *router, const char *x, uint8_t *mask, int64_t tokens,
                    int64_t selecting, float tau, int64_t threads, char *scores) {
    int64_t pairs = 0, count = tokens * router->experts, pair = 0;
    if (select_experts(router, x, mask, tokens, selecting, tau, threads, scores)) return -1;
    for (; pair + 8 <= count; pair += 8) { /* eight bytes of 0 or 1 */
        uint64_t eight;
        memcpy(&eight, mask + pair, sizeof eight);
        pairs += __builtin_popcountll(eight);
    }
    for (; pair < count; pair++) pairs += mask[pair];
    return pairs;
}

/* A whole layer; whether a score is not finite, and then nothing has run. */
int64_t dmoe_layer(const Router *router, const Layer *layer, const char *x, char *out,
                   int64_t tokens, int64_t selecting, float tau, int64_t threads, char *memory) {
    char *scores = memory + space(layer, tokens, (int)threads, memory).bytes;
    uint8_t *mask = (uint8_t *)scores + tokens * router->experts * 4;
    if (select_experts(router, x, mask, tokens, selecting, tau, threads, scores)) return 1;
    dmoe_experts(layer, x, mask, out, tokens, threads, memory);
    return 0;
}
