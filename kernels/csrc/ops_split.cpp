// split_rows and split_levels: the exact split of every expert's rows over its hosts. Decisions of
// microseconds on a few hundred integers: one thread.
#include <ATen/ops/empty.h>

#include <optional>

#include "homes.h"
#include "library.h"

namespace lockstep {
namespace {

const int64_t* integers(const at::Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_contiguous() && tensor.numel() == count,
              "split: ", name, " must be ", count, " contiguous int64, got ", tensor.sizes(), " of ",
              tensor.scalar_type());
  return tensor.const_data_ptr<int64_t>();
}

const int64_t* integers(const std::optional<at::Tensor>& tensor, int64_t count, const char* name) {
  return tensor ? integers(*tensor, count, name) : nullptr;
}

}  // namespace

at::Tensor split_rows(const at::Tensor& packed, const at::Tensor& load_in,
                      const std::optional<at::Tensor>& speeds_in,
                      const std::optional<at::Tensor>& limit_in, bool fewest_moved) {
  const Hosts hosts(integers(packed, packed.numel(), "hosts"));
  const int64_t* load = integers(load_in, hosts.experts, "load");
  const int64_t* speeds = integers(speeds_in, hosts.ranks, "speeds");
  const int64_t* limit = integers(limit_in, hosts.ranks, "limit");
  const at::Tensor none = at::empty({0}, load_in.options());
  Levels levels(hosts, load, speeds, fewest_moved ? nullptr : limit);
  std::optional<Homes> homes;
  if (fewest_moved) {
    TORCH_CHECK(limit, "split: fewest_moved without limits");
    levels.base.assign(limit, limit + hosts.ranks);
    homes.emplace(hosts, load, levels);
    if (!homes->run()) {
      Levels highest(hosts, load, speeds, nullptr);
      highest.find(true);
      for (int64_t r = 0; r < hosts.ranks; ++r) {
        const __int128 scaled = static_cast<__int128>(highest.found.rows) * (speeds ? speeds[r] : 1);
        levels.base[r] =
            std::max(levels.base[r], static_cast<int64_t>(scaled / highest.found.speed));
      }
      homes.emplace(hosts, load, levels);
      TORCH_CHECK(homes->run(), "split: no split within the optimum");
    }
  } else {
    if (!levels.find()) return none;
    homes.emplace(hosts, load, levels);
    TORCH_CHECK(homes->run(), "split: levels that no split has");
    homes->settle(levels);
  }
  const std::vector<int64_t>& rows = homes->split();
  const at::Tensor result = at::empty({hosts.instances}, load_in.options());
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < hosts.instances; ++i) out[hosts.place[i]] = rows[i];
  return result;
}

at::Tensor split_optimum(const at::Tensor& packed, const at::Tensor& loads) {
  const Hosts hosts(integers(packed, packed.numel(), "hosts"));
  TORCH_CHECK(loads.dim() == 2 && loads.size(1) == hosts.experts, "split: loads [steps, ",
              hosts.experts, "] expected, got ", loads.sizes());
  const int64_t steps = loads.size(0);
  const int64_t* load = integers(loads, loads.numel(), "loads");
  const at::Tensor result = at::empty({steps}, loads.options());
  int64_t* out = result.mutable_data_ptr<int64_t>();
  if (hosts.ranks <= 8) {
    // The densest set of ranks: rows of experts with all hosts inside, per rank.
    const int64_t sets = int64_t{1} << hosts.ranks;
    std::vector<int64_t> inside(hosts.experts), rows(sets), most(hosts.ranks + 1);
    std::vector<int32_t> size(sets);
    for (int64_t i = 0; i < hosts.instances; ++i)
      inside[hosts.expert[i]] |= int64_t{1} << hosts.rank[i];
    for (int64_t q = 1; q < sets; ++q) size[q] = size[q >> 1] + (q & 1);
    for (int64_t s = 0; s < steps; ++s, load += hosts.experts) {
      std::fill(rows.begin(), rows.end(), 0);
      for (int64_t e = 0; e < hosts.experts; ++e) rows[inside[e]] += load[e];
      for (int64_t bit = 1; bit < sets; bit *= 2)
        for (int64_t q = 0; q < sets; q += 2 * bit)
          for (int64_t p = q; p < q + bit; ++p) rows[p + bit] += rows[p];
      std::fill(most.begin(), most.end(), 0);
      for (int64_t q = 1; q < sets; ++q) most[size[q]] = std::max(most[size[q]], rows[q]);
      out[s] = 0;
      for (int64_t n = 1; n <= hosts.ranks; ++n) out[s] = std::max(out[s], (most[n] + n - 1) / n);
    }
    return result;
  }
  at::parallel_for(0, steps, 64, [&](int64_t first, int64_t last) {
    Levels levels(hosts, load, nullptr, nullptr);
    for (int64_t s = first; s < last; ++s) {
      levels.reset(load + s * hosts.experts);
      levels.find(true);
      out[s] = levels.found.rows;
    }
  });
  return result;
}

}  // namespace lockstep
