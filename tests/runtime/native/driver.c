/* Every path against the definition, on small integers whose sums are exact, in buffers of exactly the right size: compiled
 * with -fsanitize by test_sanitizers.py. Prints the number of cases and exits with 1 at the first that differs. */
#include "linear.h"
#include <stdio.h>
#include <stdlib.h>

int64_t armor_paths(void);
void armor_run(task_t *task);
void armor_many(many_t *task);
void armor_unpack(unpack_t *task);
void armor_dense(dense_t *task);
void armor_words(const dense_t *task);
void armor_attend(attention_t *task);

static uint32_t state = 1;
static int random_below(int most) { return (int)((state = state * 1664525u + 1013904223u) >> 8) % most; }

/* `count` integers from `least` to `most`, one byte past an aligned address: tensors of a file lie anywhere. */
static uint8_t *integers(int64_t count, format_t format, int least, int most, uint8_t **held) {
    *held = calloc((size_t)(bytes_of(count, format) + 1), 1);
    for (int64_t i = 0; i < count; i++) {
        const int number = least + random_below(most - least + 1);
        uint8_t *byte = *held + 1 + (format == INT4 ? i / 2 : i);
        if (format == INT8) *byte = (uint8_t)(int8_t)number;
        else if (format == INT4) *byte |= (uint8_t)(number + 8) << 4 * (i % 2); /* of a little-endian word */
        else store_number(*held + 1, i, format, (float)number);
    }
    return *held + 1;
}

static uint8_t *masks(int64_t bytes) {
    static const uint8_t nibbles[6] = {3, 5, 6, 9, 10, 12};
    uint8_t *made = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) made[i] = (uint8_t)(nibbles[random_below(6)] | nibbles[random_below(6)] << 4);
    return made;
}

static void multiply(const job_t *job, const float *core, float *out) {
    float *inner = calloc((size_t)job->columns, 4), *middle = calloc((size_t)job->rows, 4);
    for (int64_t t = 0; t < job->tokens; t++) {
        for (int64_t i = 0; i < job->columns; i++) {
            inner[i] = 0;
            for (int64_t j = 0; j < job->b_i; j++)
                inner[i] += load_number(job->b, i * job->b_i + j, (format_t)job->floats) *
                            load_number(job->x, t * job->columns + i / job->b_i * job->b_i + j, (format_t)job->activation);
        }
        for (int64_t i = 0; i < job->rows; i++) {
            middle[i] = 0;
            for (int64_t j = 0; j < job->columns; j++) middle[i] += core[i * job->columns + j] * inner[j];
        }
        for (int64_t i = 0; i < job->rows; i++) {
            float sum = load_number(job->bias, i, (format_t)job->floats);
            for (int64_t j = 0; j < job->b_o; j++)
                sum += load_number(job->a, i * job->b_o + j, (format_t)job->floats) * middle[i / job->b_o * job->b_o + j];
            out[t * job->rows + i] = sum;
        }
    }
    free(inner), free(middle);
}

static int compare(const job_t *job, const float *expected) {
    for (int64_t i = 0; i < job->tokens * job->rows; i++) {
        uint8_t rounded[4];
        store_number(rounded, 0, (format_t)job->activation, expected[i]);
        if (!memcmp(rounded, job->y + i * width((format_t)job->activation), (size_t)width((format_t)job->activation))) continue;
        printf("path %d format %d floats %d groups %d activation %d tokens %d rows %d columns %d: y[%d] is not %g\n",
               (int)job->path, (int)job->format, (int)job->floats, (int)job->groups, (int)job->activation, (int)job->tokens,
               (int)job->rows, (int)job->columns, (int)i, expected[i]);
        return 1;
    }
    return 0;
}

/* Each step in two parts. */
static int run(job_t *job, const float *expected) {
    int64_t wide = job->b_i > job->b_o ? job->b_i : job->b_o;
    wide = wide < 64 ? 64 : wide;
    task_t task = {.job = job, .inputs = 2, .outputs = 2, .work_size = 2 * wide * job->tokens};
    task.work = malloc((size_t)(4 * task.work_size) * 4);
    job->inner = malloc((size_t)(job->tokens * ((job->columns + BLOCK - 1) / BLOCK) * 2 * BLOCK) * 4);
    job->y = malloc((size_t)(job->tokens * job->rows * width((format_t)job->activation)));
    armor_run(&task);
    const int wrong = compare(job, expected);
    free(task.work), free(job->inner), free(job->y);
    return wrong;
}

/* The core as the definition says, not as the kernel does; which is compared with it. */
static int unpacked(const job_t *job, float *core) {
    const int64_t kept = job->columns / 2, count = job->rows * job->columns;
    float *other = malloc((size_t)count * 4);
    for (int64_t i = 0, value = 0; i < count; i++) {
        core[i] = 0;
        if (!(job->bitmask[i / 8] >> i % 8 & 1)) continue;
        core[i] = load_number(job->values, value, (format_t)job->format);
        if (job->groups) core[i] *= load_number(job->scale, value / (kept / job->groups), (format_t)job->floats);
        value++;
    }
    unpack_t unpack = {.job = job, .out = (uint8_t *)other, .parts = 3, .out_format = FP32};
    armor_unpack(&unpack);
    const int wrong = memcmp(core, other, (size_t)count * 4) != 0;
    if (wrong) printf("unpacking differs: format %d groups %d\n", (int)job->format, (int)job->groups);
    free(other);
    return wrong;
}

/* With int4 cores Bx has 8 bits at times: x whose every fourth column is 127 or -127, and a B that moves each column to the next
 * place of its block, are exact there, too. */
static void eight_bits(job_t *job, uint8_t *x, uint8_t *b) {
    for (int64_t i = 0; i < job->tokens * job->columns; i++)
        store_number(x, i, (format_t)job->activation, (float)(i % 4 ? random_below(253) - 126 : 254 * random_below(2) - 127));
    for (int64_t i = 0; i < job->columns; i++)
        for (int64_t j = 0; j < job->b_i; j++)
            store_number(b, i * job->b_i + j, (format_t)job->floats, (j + 1) % job->b_i == i % job->b_i);
}

/* rows, columns, b_o, b_i; the core's values with `groups` scales a row. */
static int shape(const int64_t sizes[4], format_t format, int64_t groups, format_t floats, format_t activation, int64_t tokens,
                 const int *paths, int *cases) {
    const int64_t rows = sizes[0], columns = sizes[1], b_o = sizes[2], b_i = sizes[3];
    uint8_t *held[6], *mask = masks(rows * columns / 8);
    const int least = format == INT8 ? -128 : format == INT4 ? -8 : -3, most = format == INT8 ? 127 : format == INT4 ? 7 : 3;
    job_t job = {.tokens = tokens, .rows = rows, .columns = columns, .groups = groups, .b_o = b_o, .b_i = b_i,
                 .format = format, .floats = floats, .activation = activation, .bitmask = mask};
    uint8_t *x = integers(tokens * columns, activation, -2, 2, &held[0]), *b = integers(columns * b_i, floats, -1, 1, &held[3]);
    if (format == INT4) eight_bits(&job, x, b);
    job.x = x, job.b = b;
    job.values = integers(rows * columns / 2, format, least, most, &held[1]);
    job.a = integers(rows * b_o, floats, -1, 1, &held[2]);
    job.bias = integers(rows, floats, -5, 5, &held[4]);
    job.scale = integers(rows * groups, floats, 1, 3, &held[5]);
    if (!groups) job.scale = NULL;
    float *core = malloc((size_t)(rows * columns) * 4), *expected = malloc((size_t)(tokens * rows) * 4);
    int wrong = unpacked(&job, core);
    multiply(&job, core, expected);
    for (int path = 0; path < 3; path++)
        if (paths[path]) job.path = path, wrong |= run(&job, expected), ++*cases;
    for (int i = 0; i < 6; i++) free(held[i]);
    free(mask), free(core), free(expected);
    return wrong;
}

/* Float cores, and integers with one scale a row and, where a row is whole groups, with scales for 8 to 64 kept values. */
static int cores(const int64_t sizes[4], format_t floats, format_t activation, int64_t tokens, const int *paths, int *cases) {
    int wrong = shape(sizes, floats, 0, floats, activation, tokens, paths, cases);
    if (floats != activation) return wrong; /* as float cores do, integers meet x as float32 */
    for (int format = INT8; format <= INT4 && !wrong; format++)
        for (int64_t group = 0; group <= 128 && !wrong; group = group < 32 ? group + 16 : 2 * group) {
            if (sizes[1] % (group ? group : format == INT4 ? 16 : 8)) continue;
            wrong = shape(sizes, (format_t)format, group ? sizes[1] / group : 1, floats, activation, tokens, paths, cases);
        }
    return wrong;
}

/* Row r, column c of a dense layer's weight. */
static float weight_of(const dense_t *task, int64_t r, int64_t c) {
    const int64_t index = r * task->columns + c;
    if (!task->scale) return load_number(task->w, index, BF16);
    const float scale = load_number(task->scale, r * task->groups + c / (task->columns / task->groups), BF16);
    return scale * (float)(int8_t)(task->w[index] ^ task->flip);
}

/* A dense layer, rows in three parts; of integers where it has groups. */
static int dense(int64_t rows, int64_t columns, int64_t tokens, int64_t groups, int64_t flip) {
    uint8_t *held[5], *y = malloc((size_t)(2 * tokens * rows));
    dense_t task = {.y = y, .tokens = tokens, .rows = rows, .columns = columns, .groups = groups, .flip = flip, .parts = 3};
    task.x = integers(tokens * columns, BF16, -8, 8, &held[0]);
    task.w = integers(rows * columns, groups ? INT8 : BF16, groups ? -128 : -8, groups ? 127 : 8, &held[1]);
    task.bias = integers(rows, BF16, -8, 8, &held[2]);
    const uint8_t *scale = integers(rows * (groups ? groups : 1), BF16, -2, 2, &held[3]);
    if (groups) {
        task.scale = scale;
        task.words = held[4] = malloc((size_t)(tokens * (words_pitch(columns) + 4)));
        armor_words(&task);
    } else
        held[4] = NULL;
    armor_dense(&task);
    int wrong = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            float sum = load_number(task.bias, r, BF16);
            for (int64_t c = 0; c < columns; c++) sum += weight_of(&task, r, c) * load_number(task.x, t * columns + c, BF16);
            uint16_t found;
            memcpy(&found, y + 2 * (t * rows + r), 2);
            wrong |= found != float_to_bfloat(sum);
        }
    if (wrong)
        printf("dense differs: %d tokens %d rows %d columns %d groups\n", (int)tokens, (int)rows, (int)columns, (int)groups);
    for (int i = 0; i < 5; i++) free(held[i]);
    free(y);
    return wrong;
}

/* Many tokens; A and B are of small integers, and sums few enough that they are exact in bf16. */
static int many(int64_t rows, int64_t columns, int64_t b_o, int64_t b_i, int64_t tokens, int format, int64_t groups) {
    const int64_t tiles = (tokens + MANY_TOKENS - 1) / MANY_TOKENS, chunks = columns / BLOCK, unit = b_i > BLOCK ? b_i : BLOCK;
    uint8_t *held[6], *bitmask = masks(rows * columns / 8), *y = malloc((size_t)(2 * tokens * rows));
    job_t job = {.y = y, .bitmask = bitmask, .tokens = tokens, .rows = rows, .columns = columns, .groups = groups, .b_o = b_o,
                 .b_i = b_i, .format = format, .floats = BF16, .activation = BF16, .path = 2};
    job.x = integers(tokens * columns, BF16, 0, 0, &held[0]);
    job.values = integers(rows * columns / 2, (format_t)format, format == INT8 ? -128 : -8, format == INT8 ? 127 : 7, &held[1]);
    job.a = integers(rows * b_o, BF16, -1, 1, &held[2]);
    job.b = integers(columns * b_i, BF16, 0, 0, &held[3]);
    job.bias = integers(rows, BF16, -8, 8, &held[4]);
    const uint8_t *scale = integers(rows * (groups ? groups : 1), BF16, 1, 1, &held[5]);
    if (groups) job.scale = scale;
    for (int64_t i = 0; i < columns; i++) /* each column to the next place of its block */
        store_number(held[3] + 1, i * b_i + (i % b_i + b_i - 1) % b_i, BF16, 1.0f);
    for (int64_t t = 0; t < tokens; t++) store_number(held[0] + 1, t * columns + random_below((int)columns), BF16, t % 2 ? -1.0f : 1.0f);
    float *core = malloc((size_t)(4 * rows * columns)), *wanted = malloc((size_t)(4 * rows * tokens));
    unpack_t all = {&job, (uint8_t *)core, 1, FP32, 0};
    armor_unpack(&all);
    multiply(&job, core, wanted);
    const int64_t part = 2 * b_o < rows ? 2 * b_o : rows, inner = tiles * chunks * MANY_STORED, units = tiles * chunks * MANY_TOKENS;
    int64_t work = part * (MANY_TOKENS * (tiles + 1) + 24) + MANY_TOKENS * ((part + 1) / 2) + 96 * BLOCK;
    if (work < 160 * unit) work = 160 * unit;
    many_t task = {.job = &job, .inner = malloc((size_t)inner), .units = malloc((size_t)(4 * units)), .work = malloc((size_t)(4 * work)),
                   .work_size = work, .inputs = columns / unit < 2 ? 1 : 2, .blocks = part / b_o};
    armor_many(&task);
    int wrong = 0;
    for (int64_t i = 0; i < tokens * rows; i++) {
        uint16_t found;
        memcpy(&found, y + 2 * i, 2);
        wrong |= found != float_to_bfloat(wanted[i]);
    }
    if (wrong) printf("many differ: %d tokens, %d x %d, blocks %d and %d, format %d\n", (int)tokens, (int)rows, (int)columns, (int)b_o, (int)b_i, format);
    for (int i = 0; i < 6; i++) free(held[i]);
    free(bitmask), free(y), free(core), free(wanted), free(task.inner), free(task.units), free(task.work);
    return wrong;
}

/* Attention over rows of K and V with numbers between them that are no one's, of which keys are all equal, so that y is the mean of V. */
static int attention(int64_t heads, int64_t kv_heads, int64_t length, int64_t size) {
    const int64_t row = size + 8, parts = 2 * heads;
    uint8_t *held[3], *y = malloc((size_t)(2 * parts * size));
    attention_t task = {.y = y, .work = malloc((size_t)(4 * parts * length)), .parts = parts, .heads = heads, .kv_heads = kv_heads,
                        .length = length, .size = size, .k_sequence = length * row, .k_head = 0, .k_row = row,
                        .v_sequence = kv_heads * length * row, .v_head = length * row, .v_row = row, .scale = 0.125f};
    task.q = integers(parts * size, BF16, -2, 2, &held[0]);
    task.k = integers(2 * length * row, BF16, 1, 1, &held[1]);
    task.v = integers(2 * kv_heads * length * row, BF16, -8, 8, &held[2]);
    armor_attend(&task);
    int wrong = 0;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t c = 0; c < size; c++) {
            const int64_t kv = part / heads * kv_heads + part % heads / (heads / kv_heads);
            float sum = 0.0f;
            for (int64_t p = 0; p < length; p++) sum += load_number(task.v, (kv * length + p) * row + c, BF16);
            const float error = load_number(y, part * size + c, BF16) - sum / (float)length;
            wrong |= !(error < 0.02f && error > -0.02f);
        }
    if (wrong) printf("attention differs: %d heads, %d of keys, %d long, %d\n", (int)heads, (int)kv_heads, (int)length, (int)size);
    for (int i = 0; i < 3; i++) free(held[i]);
    free(y), free(task.work);
    return wrong;
}

int main(void) {
    const int paths[3] = {1, (int)(armor_paths() >> 1 & 1), EMULATED_AVX512};
    static const int64_t sizes[][4] = {{8, 8, 8, 8},     {3, 16, 1, 1},   {9, 24, 3, 4},   {66, 32, 33, 16}, {70, 40, 7, 5},
                                       {12, 56, 12, 56}, {65, 64, 65, 1}, {130, 72, 1, 9}, {64, 520, 64, 65}, {5, 1056, 5, 33}, {7, 256, 7, 32}};
    int cases = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int floats = BF16; floats <= FP32; floats++)
            for (int activation = BF16; activation <= FP32; activation++)
                for (int64_t tokens = 1; tokens <= MOST_TOKENS; tokens++)
                    if (cores(sizes[s], (format_t)floats, (format_t)activation, tokens, paths, &cases)) return 1;
    static const int64_t wide[4] = {5, GROUPED_COLUMNS + 1024, 5, 8};
    for (int64_t tokens = 1; tokens <= 2; tokens++)
        if (cores(wide, FP32, FP32, tokens, paths, &cases)) return 1;
    for (int64_t tokens = 1; tokens <= MOST_TOKENS && EMULATED_AVX512; tokens++)
        if (dense(1, 1, tokens, 0, 0) || dense(7, 40, tokens, 0, 0) || dense(110, 97, tokens, 0, 0) || dense(1, 1, tokens, 1, 0) ||
            dense(110, 97, tokens, 1, 0) || dense(9, 36, tokens, 1, 128) || dense(9, 192, tokens, 3, 128))
            return 1;
    for (int format = BF16; format <= INT4 && EMULATED_AVX512; format++)
        if (format == BF16 || format >= INT8)
            for (int64_t tokens = 1; tokens <= 130; tokens += 43)
                if (many(10, 128, 2, 8, tokens, format, format == BF16 ? 0 : 2) || many(7, 64, 1, 1, tokens, format, format != BF16) ||
                    many(18, 256, 6, 128, tokens, format, format == BF16 ? 0 : 4))
                    return 1;
    for (int64_t length = 1; length <= 50 && EMULATED_AVX512; length += 7)
        if (attention(4, 2, length, 64) || attention(3, 1, length, 96) || attention(2, 2, length, 128) || attention(1, 1, length, 256)) return 1;
    if (EMULATED_AVX512 && dense(5, GROUPED_COLUMNS + 40, 1, 1, 0)) return 1;
    printf("%d cases agree\n", cases);
    return 0;
}
