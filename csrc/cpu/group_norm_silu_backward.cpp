// With xhat = (x + channel_add - mean) * rstd, v = xhat * weight + bias, y = silu(v), dv = grad_y * silu'(v):
//   grad_bias = sum dv, grad_weight = sum dv * xhat                       over samples and positions
//   grad_x = rstd * (dv * weight - m1 - xhat * m2)
//   m1, m2 = mean of dv * weight and of dv * weight * xhat                over the group
//   grad_channel_add = sum of grad_x                                      over positions
// One pass sums dv, dv * (x - shift) and x - shift per channel; all else follows from these sums.
#include "group_norm_silu.h"
#include "isa.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

// Per-channel sums over the positions of a block or of a sample.
template <typename Number> struct Sums {
    Number *dv, *dv_x, *x; // dv, dv * (x - shift), x - shift
};

template <typename T> struct BackwardPasses {
    const GroupNormSiluBackward &a;
    Layout<T> layout;
    int64_t slots = layout.slots;
    Workspace<float> partial; // [n, blocks, 3, slots] or [units, blocks, 3]
    Workspace<double> total;  // [n, 3, slots]
    Workspace<float> tables;  // weight, bias, then 4 tables per sample

    explicit BackwardPasses(const GroupNormSiluBackward &arguments)
        : a(arguments), layout(a.shape, a.x, a.skip),
          partial(workspace<float>(layout.units() * layout.blocks() * 3 * (layout.shape.channels_last ? slots : 1))),
          total(workspace<double>(a.shape.n * 3 * slots)), tables(workspace<float>((2 + 4 * a.shape.n) * slots)) {
        fill_table(layout, a.weight, 1.0f, tables.get());
        fill_table(layout, a.bias, 0.0f, tables.get() + slots);
    }

    const float *weight() const { return tables.get(); }
    const float *bias() const { return tables.get() + slots; }
    float *shift(int64_t n) const { return tables.get() + (2 + 4 * n) * slots; }
    float *scale(int64_t n) const { return shift(n) + slots; }          // rstd * weight
    float *x_factor(int64_t n) const { return shift(n) + 2 * slots; }   // rstd^2 * m2
    float *subtrahend(int64_t n) const { return shift(n) + 3 * slots; } // rstd * m1
    Sums<double> totals(int64_t n) const {
        double *at = total.get() + n * 3 * slots;
        return {at, at + slots, at + 2 * slots};
    }
    float rstd(int64_t n, int64_t group) const { return a.rstd[n * a.shape.groups + group]; }
    T *grad_of(const Part<T> &part) const {
        return static_cast<T *>(&part == &layout.parts[0] ? a.grad_x : a.grad_skip);
    }
    bool wants_input_gradient() const { return a.grad_x || a.grad_skip; }

    void prepare_group(int64_t n, int64_t group) const {
        const int64_t width = a.shape.group_channels();
        const T *added = static_cast<const T *>(a.channel_add) + n * a.shape.channels();
        for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
            const int64_t slot = layout.slot_of(channel);
            const float add = a.channel_add ? read_scalar(added, channel, a.shape.dtype) : 0.0f;
            shift(n)[slot] = a.mean[n * a.shape.groups + group] - add;
            scale(n)[slot] = rstd(n, group) * weight()[slot];
        }
    }

    void finish_group(int64_t n, int64_t group) const {
        const int64_t width = a.shape.group_channels(), begin = group * width, end = begin + width;
        const Sums<double> sums = totals(n);
        const double r = rstd(n, group), elements = layout.group_elements();
        double m1 = 0, m2 = 0;
        for (int64_t channel = begin; channel < end; ++channel) {
            const int64_t slot = layout.slot_of(channel);
            m1 += weight()[slot] * sums.dv[slot];
            m2 += weight()[slot] * sums.dv_x[slot];
        }
        m1 /= elements;
        m2 *= r / elements;
        for (int64_t channel = begin; channel < end; ++channel) {
            const int64_t slot = layout.slot_of(channel);
            subtrahend(n)[slot] = static_cast<float>(r * m1);
            x_factor(n)[slot] = static_cast<float>(r * r * m2);
            if (a.grad_channel_add)
                a.grad_channel_add[n * a.shape.channels() + channel] =
                    static_cast<float>(r * (weight()[slot] * sums.dv[slot] - m1 * a.shape.hw - r * m2 * sums.x[slot]));
        }
    }

    // after all passes, in the order of the samples
    void reduce_samples() const {
        for (int64_t channel = 0; channel < a.shape.channels(); ++channel) {
            const int64_t slot = layout.slot_of(channel), group = channel / a.shape.group_channels();
            double weight_sum = 0, bias_sum = 0;
            for (int64_t n = 0; n < a.shape.n; ++n) {
                bias_sum += totals(n).dv[slot];
                weight_sum += totals(n).dv_x[slot] * rstd(n, group);
            }
            if (a.grad_weight)
                a.grad_weight[channel] = static_cast<float>(weight_sum);
            if (a.grad_bias)
                a.grad_bias[channel] = static_cast<float>(bias_sum);
        }
    }

    // dv from grad_y and v, as exactly as a Result holds it
    template <typename Result> KOLORS_FAST_INLINE Floats activation_gradient(Floats grad, Floats v) const {
        return a.shape.silu ? grad * silu_gradient<Result>(v) : grad;
    }
};

template <typename T> struct ChannelsLastBackward : BackwardPasses<T> {
    using Base = BackwardPasses<T>;
    using Base::a, Base::layout, Base::Base, Base::slots;

    void prepare(int64_t n) const {
        for (int64_t group = 0; group < a.shape.groups; ++group)
            this->prepare_group(n, group);
    }

    void first(int64_t n, int64_t block) const {
        const Rows rows(layout, n, block);
        float *partial = this->partial.get() + (n * layout.blocks() + block) * 3 * slots;
        std::memset(partial, 0, 3 * slots * sizeof(float));
        const T *grad = static_cast<const T *>(a.grad_y) + rows.offset(a.shape.hw, a.shape.channels());
        for_rows(rows.count, [&](int64_t row, auto rows_at_once) { add_rows<rows_at_once>(rows, row, grad, partial); });
    }

    template <int kRows> void add_rows(const Rows &rows, int64_t row, const T *grad, float *partial) const {
        grad += row * a.shape.channels();
        for (const Part<T> &part : layout.parts) {
            const T *x = part.data + rows.offset(a.shape.hw, part.channels) + row * part.channels;
            const T *dy = grad + part.first_channel;
            const float *shift = this->shift(rows.n) + part.slot, *scale = this->scale(rows.n) + part.slot,
                        *bias = this->bias() + part.slot;
            float *sum_dv = partial + part.slot, *sum_dv_x = sum_dv + slots, *sum_x = sum_dv_x + slots;
            for_vectors(part.channels, [&](int64_t i, auto vector) {
                prefetch_rows<kRows>(x, i);
                prefetch_rows<kRows>(grad, part.first_channel + i);
                Floats dvs = {}, dv_xs = {}, xs = {};
                for (int k = 0; k < kRows; ++k) {
                    const Floats d = vector.load(x + k * part.channels + i) - load(shift + i);
                    const Floats dy_k = vector.load(dy + k * a.shape.channels() + i);
                    const Floats dv =
                        this->template activation_gradient<float>(dy_k, d * load(scale + i) + load(bias + i));
                    dvs += dv;
                    dv_xs += dv * d;
                    xs += d;
                }
                store(sum_dv + i, load(sum_dv + i) + dvs);
                store(sum_dv_x + i, load(sum_dv_x + i) + dv_xs);
                store(sum_x + i, load(sum_x + i) + xs);
            });
        }
    }

    void finish(int64_t n) const {
        const int64_t blocks = layout.blocks();
        const float *partial = this->partial.get() + n * blocks * 3 * slots;
        double *total = this->totals(n).dv;
        for (int64_t i = 0; i < 3 * slots; ++i)
            total[i] = 0;
        for (int64_t block = 0; block < blocks; ++block, partial += 3 * slots)
            for (int64_t i = 0; i < 3 * slots; ++i)
                total[i] += partial[i];
        for (int64_t group = 0; group < a.shape.groups; ++group)
            this->finish_group(n, group);
    }

    void second(int64_t n, int64_t block) const {
        if (!this->wants_input_gradient())
            return;
        const Rows rows(layout, n, block);
        const T *grad = static_cast<const T *>(a.grad_y) + rows.offset(a.shape.hw, a.shape.channels());
        for (int64_t row = 0; row < rows.count; ++row, grad += a.shape.channels())
            for (const Part<T> &part : layout.parts) {
                if (!this->grad_of(part))
                    continue;
                const int64_t at = rows.offset(a.shape.hw, part.channels) + row * part.channels;
                const T *x = part.data + at, *dy = grad + part.first_channel;
                T *dx = this->grad_of(part) + at;
                const float *shift = this->shift(n) + part.slot, *scale = this->scale(n) + part.slot,
                            *bias = this->bias() + part.slot, *x_factor = this->x_factor(n) + part.slot,
                            *subtrahend = this->subtrahend(n) + part.slot;
                for_vectors(part.channels, [&](int64_t i, auto vector) {
                    prefetch(x + i);
                    prefetch(dy + i);
                    prefetch<true>(dx + i);
                    const Floats d = vector.load(x + i) - load(shift + i), s = load(scale + i);
                    const Floats dv =
                        this->template activation_gradient<T>(vector.load(dy + i), d * s + load(bias + i));
                    vector.store(dx + i, dv * s - d * load(x_factor + i) - load(subtrahend + i));
                });
            }
    }
};

template <typename T> struct ChannelsFirstBackward : BackwardPasses<T> {
    using Base = BackwardPasses<T>;
    using Base::a, Base::layout, Base::Base;

    void prepare(int64_t unit) const { this->prepare_group(unit / a.shape.groups, unit % a.shape.groups); }

    // Calls body(position, access, x - shift, dv) for each vector of a run.
    template <typename Result, typename Body> KOLORS_FAST_INLINE void for_run(const Run &run, const Body &body) const {
        const Part<T> &part = layout.part_of(run.channel);
        const T *x = part.data + run.offset(a.shape.hw, part.channels, part.first_channel);
        const T *dy = static_cast<const T *>(a.grad_y) + run.offset(a.shape.hw, a.shape.channels(), 0);
        const int64_t slot = layout.slot_of(run.channel);
        const float shift = this->shift(run.n)[slot], scale = this->scale(run.n)[slot], bias = this->bias()[slot];
        for_vectors(run.count, [&](int64_t i, auto vector) {
            const Floats d = vector.load(x + i) - shift;
            body(i, vector, d, this->template activation_gradient<Result>(vector.load(dy + i), d * scale + bias));
        });
    }

    void first(int64_t unit, int64_t block) const {
        const Run run(layout, unit, block);
        Floats sum_dv = {}, sum_dv_x = {}, sum_x = {};
        for_run<float>(run, [&](int64_t, auto vector, Floats d, Floats dv) {
            sum_dv += vector.only(dv);
            sum_dv_x += vector.only(dv * d);
            sum_x += vector.only(d);
        });
        float *partial = this->partial.get() + (unit * layout.blocks() + block) * 3;
        partial[0] = static_cast<float>(sum_lanes(sum_dv));
        partial[1] = static_cast<float>(sum_lanes(sum_dv_x));
        partial[2] = static_cast<float>(sum_lanes(sum_x));
    }

    void finish(int64_t unit) const {
        const int64_t blocks = layout.blocks(), n = unit / a.shape.groups;
        const float *partial = this->partial.get() + unit * blocks * 3;
        const Sums<double> sums = this->totals(n);
        for (int64_t block = 0; block < blocks; ++block, partial += 3) {
            const Run run(layout, unit, block);
            const int64_t slot = layout.slot_of(run.channel);
            if (run.first == 0)
                sums.dv[slot] = sums.dv_x[slot] = sums.x[slot] = 0;
            sums.dv[slot] += partial[0];
            sums.dv_x[slot] += partial[1];
            sums.x[slot] += partial[2];
        }
        this->finish_group(n, unit % a.shape.groups);
    }

    void second(int64_t unit, int64_t block) const {
        const Run run(layout, unit, block);
        const Part<T> &part = layout.part_of(run.channel);
        if (!this->grad_of(part))
            return;
        const int64_t slot = layout.slot_of(run.channel);
        T *dx = this->grad_of(part) + run.offset(a.shape.hw, part.channels, part.first_channel);
        const float scale = this->scale(run.n)[slot], x_factor = this->x_factor(run.n)[slot],
                    subtrahend = this->subtrahend(run.n)[slot];
        for_run<T>(run, [&](int64_t i, auto vector, Floats d, Floats dv) {
            vector.store(dx + i, dv * scale - d * x_factor - subtrahend);
        });
    }
};

} // namespace

void group_norm_silu_backward(const GroupNormSiluBackward &a) {
    for_dtype(a.shape.dtype, [&](auto element) {
        using T = decltype(element);
        const Layout<T> layout(a.shape, a.x, a.skip);
        const auto run = [&](const auto &passes) {
            run_passes(layout.units(), layout.blocks(), layout.threads(), passes);
            if (a.grad_weight || a.grad_bias)
                passes.reduce_samples();
        };
        if (layout.shape.channels_last)
            run(ChannelsLastBackward<T>(a));
        else
            run(ChannelsFirstBackward<T>(a));
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
