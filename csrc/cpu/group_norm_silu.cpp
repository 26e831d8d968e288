// y = act((x + channel_add - mean) * rstd * weight + bias) over the concatenation of x and skip, per group.
//
// Statistics: each block takes a pivot from its own data, sums deviations from it in fp32, and merges channels and
// blocks in fp64 (Chan). A pivot that is the mean of k of a block's R rows costs at most a factor R/k in rounding error
// of the variance, whatever the data: those k rows themselves contribute k (pivot - mean)^2 to it.
#include "group_norm_silu.h"
#include "isa.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

struct Moments {
    double mean, squares; // sum of squared deviations from the mean
};

template <typename T> struct ForwardPasses {
    const GroupNormSiluForward &a;
    Layout<T> layout;
    int64_t slots = layout.slots;
    Workspace<float> tables; // weight, bias, then 4 tables per sample

    explicit ForwardPasses(const GroupNormSiluForward &arguments)
        : a(arguments), layout(a.shape, a.x, a.skip), tables(workspace<float>((2 + 4 * a.shape.n) * slots)) {
        fill_table(layout, a.weight, 1.0f, tables.get());
        fill_table(layout, a.bias, 0.0f, tables.get() + slots);
    }

    const float *weight() const { return tables.get(); }
    const float *bias() const { return tables.get() + slots; }
    float *added(int64_t n) const { return tables.get() + (2 + 4 * n) * slots; }
    float *shift(int64_t n) const { return added(n) + slots; }
    float *scale(int64_t n) const { return added(n) + 2 * slots; }
    float *offset(int64_t n) const { return added(n) + 3 * slots; }

    void add_channels(int64_t n, int64_t begin, int64_t end) const {
        const T *values = static_cast<const T *>(a.channel_add) + n * a.shape.channels();
        for (int64_t channel = begin; channel < end; ++channel)
            added(n)[layout.slot_of(channel)] = a.channel_add ? read_scalar(values, channel, a.shape.dtype) : 0.0f;
    }

    // y = (x - shift) * scale + offset. What the rounding of shift loses goes into offset: with a mean far from zero
    // that is most of the error.
    void set_group(int64_t n, int64_t group, double mean, double squares) const {
        const double rstd = 1.0 / __builtin_sqrt(squares / layout.group_elements() + a.eps);
        a.mean[n * a.shape.groups + group] = static_cast<float>(mean);
        a.rstd[n * a.shape.groups + group] = static_cast<float>(rstd);
        const int64_t width = a.shape.group_channels();
        for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
            const int64_t slot = layout.slot_of(channel);
            const double exact = mean - added(n)[slot], factor = rstd * weight()[slot];
            const float rounded = static_cast<float>(exact);
            shift(n)[slot] = rounded;
            scale(n)[slot] = static_cast<float>(factor);
            offset(n)[slot] = static_cast<float>(bias()[slot] - (exact - rounded) * factor);
        }
    }

    KOLORS_FAST_INLINE Floats activate(Floats v) const { return a.shape.silu ? silu<T>(v) : v; }
};

template <typename T> struct ChannelsLastForward : ForwardPasses<T> {
    using Base = ForwardPasses<T>;
    using Base::a, Base::layout, Base::slots;
    Workspace<float> partial; // [n, blocks, 3, slots]: pivot, then the sums of x - pivot and of its square
    Workspace<double> total;  // [n, 3, slots]: origin, then the sums of x - origin and of its square

    explicit ChannelsLastForward(const GroupNormSiluForward &arguments)
        : Base(arguments), partial(workspace<float>(a.shape.n * layout.blocks() * 3 * slots)),
          total(workspace<double>(a.shape.n * 3 * slots)) {}

    void prepare(int64_t n) const { this->add_channels(n, 0, a.shape.channels()); }

    void first(int64_t n, int64_t block) const {
        const Rows rows(layout, n, block);
        float *pivot = partial.get() + (n * layout.blocks() + block) * 3 * slots;
        for (const Part<T> &part : layout.parts) {
            const T *x = part.data + rows.offset(a.shape.hw, part.channels);
            for_rows(rows.count, [&](int64_t row, auto rows_at_once) {
                if (row == 0)
                    add_rows<rows_at_once, true>(part.channels, x, pivot + part.slot);
                else
                    add_rows<rows_at_once, false>(part.channels, x + row * part.channels, pivot + part.slot);
            });
        }
    }

    // Adds kRows rows to the sums of a block, the first of which set the pivot.
    template <int kRows, bool kFirst> void add_rows(int64_t channels, const T *x, float *pivot) const {
        float *sum = pivot + slots, *square = sum + slots;
        for_vectors(channels, [&](int64_t i, auto vector) {
            prefetch_rows<kRows>(x, i);
            Floats values[kRows], p = {};
            for (int k = 0; k < kRows; ++k)
                values[k] = vector.load(x + k * channels + i);
            if (kFirst) {
                for (int k = 0; k < kRows; ++k)
                    p += values[k];
                p *= 1.0f / kRows;
                store(pivot + i, p);
            } else {
                p = load(pivot + i);
            }
            Floats s = {}, q = {};
            for (int k = 0; k < kRows; ++k) {
                const Floats d = values[k] - p;
                s += d;
                q += d * d;
            }
            store(sum + i, kFirst ? s : load(sum + i) + s);
            store(square + i, kFirst ? q : load(square + i) + q);
        });
    }

    void finish(int64_t n) const {
        const double hw = static_cast<double>(a.shape.hw), inverse = 1.0 / hw;
        double *origin = total.get() + n * 3 * slots, *sum = origin + slots, *square = sum + slots;
        for (int64_t block = 0; block < layout.blocks(); ++block)
            merge_block(n, block, origin, sum, square);
        const float *added = this->added(n);
        const int64_t width = a.shape.group_channels();
        for (int64_t group = 0; group < a.shape.groups; ++group) {
            const auto channel_mean = [&](int64_t slot) { return origin[slot] + added[slot] + sum[slot] * inverse; };
            double mean = 0, squares = 0;
            for (int64_t channel = group * width; channel < (group + 1) * width; ++channel)
                mean += channel_mean(layout.slot_of(channel));
            mean /= static_cast<double>(width);
            for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
                const int64_t slot = layout.slot_of(channel);
                const double deviation = channel_mean(slot) - mean;
                squares += square[slot] - sum[slot] * sum[slot] * inverse + hw * deviation * deviation;
            }
            this->set_group(n, group, mean, squares);
        }
    }

    // The origin is each channel's mean in the first block, so that fp64 has digits to spare.
    void merge_block(int64_t n, int64_t block, double *origin, double *sum, double *square) const {
        const float *pivot = partial.get() + (n * layout.blocks() + block) * 3 * slots;
        const double count = static_cast<double>(Rows(layout, n, block).count), inverse = 1.0 / count;
        if (block == 0)
            for (int64_t i = 0; i < slots; ++i) {
                origin[i] = pivot[i] + pivot[slots + i] * inverse;
                sum[i] = square[i] = 0;
            }
        for (int64_t i = 0; i < slots; ++i) {
            const double s = pivot[slots + i], deviation = pivot[i] + s * inverse - origin[i];
            sum[i] += count * deviation;
            square[i] += pivot[2 * slots + i] - s * s * inverse + count * deviation * deviation;
        }
    }

    void second(int64_t n, int64_t block) const {
        const Rows rows(layout, n, block);
        T *y = static_cast<T *>(a.y) + rows.offset(a.shape.hw, a.shape.channels());
        for (int64_t row = 0; row < rows.count; ++row, y += a.shape.channels())
            for (const Part<T> &part : layout.parts) {
                const T *x = part.data + rows.offset(a.shape.hw, part.channels) + row * part.channels;
                T *out = y + part.first_channel;
                const float *shift = this->shift(n) + part.slot, *scale = this->scale(n) + part.slot,
                            *offset = this->offset(n) + part.slot;
                for_vectors(part.channels, [&](int64_t i, auto vector) {
                    prefetch(x + i);
                    prefetch<true>(out + i);
                    const Floats v = (vector.load(x + i) - load(shift + i)) * load(scale + i) + load(offset + i);
                    vector.store(out + i, this->activate(v));
                });
            }
    }
};

template <typename T> struct ChannelsFirstForward : ForwardPasses<T> {
    using Base = ForwardPasses<T>;
    using Base::a, Base::layout;
    Workspace<Moments> moments; // [units, blocks]

    explicit ChannelsFirstForward(const GroupNormSiluForward &arguments)
        : Base(arguments), moments(workspace<Moments>(layout.units() * layout.blocks())) {}

    const T *input(const Run &run) const {
        const Part<T> &part = layout.part_of(run.channel);
        return part.data + run.offset(a.shape.hw, part.channels, part.first_channel);
    }

    void prepare(int64_t unit) const {
        const int64_t width = a.shape.group_channels(), group = unit % a.shape.groups;
        this->add_channels(unit / a.shape.groups, group * width, (group + 1) * width);
    }

    void first(int64_t unit, int64_t block) const {
        const Run run(layout, unit, block);
        const T *x = input(run);
        const int64_t pivot_count = at_most(run.count, padded(ceil_div(run.count, 16)));
        Floats totals = {};
        for_vectors(pivot_count, [&](int64_t i, auto vector) { totals += vector.load(x + i); });
        const float pivot = static_cast<float>(sum_lanes(totals) / pivot_count);
        Floats sums = {}, squares = {};
        int64_t i = 0;
        for (; i + 4 * kWidth <= run.count; i += 4 * kWidth) {
            const Floats d0 = load(x + i) - pivot, d1 = load(x + i + kWidth) - pivot;
            const Floats d2 = load(x + i + 2 * kWidth) - pivot, d3 = load(x + i + 3 * kWidth) - pivot;
            sums += (d0 + d1) + (d2 + d3);
            squares += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        }
        for_vectors(run.count - i, [&](int64_t j, auto vector) {
            const Floats d = vector.only(vector.load(x + i + j) - pivot);
            sums += d;
            squares += d * d;
        });
        const double sum = sum_lanes(sums), square = sum_lanes(squares);
        const float added = this->added(run.n)[layout.slot_of(run.channel)];
        moments[unit * layout.blocks() + block] = {static_cast<double>(pivot) + added + sum / run.count,
                                                   square - sum * sum / run.count};
    }

    void finish(int64_t unit) const {
        const int64_t blocks = layout.blocks();
        const Moments *moments = this->moments.get() + unit * blocks;
        double mean = 0, squares = 0;
        for (int64_t block = 0; block < blocks; ++block)
            mean += moments[block].mean * Run(layout, unit, block).count;
        mean /= layout.group_elements();
        for (int64_t block = 0; block < blocks; ++block) {
            const double deviation = moments[block].mean - mean;
            squares += moments[block].squares + Run(layout, unit, block).count * deviation * deviation;
        }
        this->set_group(unit / a.shape.groups, unit % a.shape.groups, mean, squares);
    }

    void second(int64_t unit, int64_t block) const {
        const Run run(layout, unit, block);
        const T *x = input(run);
        T *y = static_cast<T *>(a.y) + run.offset(a.shape.hw, a.shape.channels(), 0);
        const int64_t slot = layout.slot_of(run.channel);
        const float shift = this->shift(run.n)[slot], scale = this->scale(run.n)[slot],
                    offset = this->offset(run.n)[slot];
        for_vectors(run.count, [&](int64_t i, auto vector) {
            vector.store(y + i, this->activate((vector.load(x + i) - shift) * scale + offset));
        });
    }
};

} // namespace

void group_norm_silu_forward(const GroupNormSiluForward &a) {
    for_dtype(a.shape.dtype, [&](auto element) {
        using T = decltype(element);
        const Layout<T> layout(a.shape, a.x, a.skip);
        const auto run = [&](const auto &passes) {
            run_passes(layout.units(), layout.blocks(), layout.threads(), passes);
        };
        if (layout.shape.channels_last)
            run(ChannelsLastForward<T>(a));
        else
            run(ChannelsFirstForward<T>(a));
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
