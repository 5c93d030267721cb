// Collectives in shared memory as ops: sizes are checked, then lane.cpp moves the bytes.
#include <numeric>

#include "lane.h"
#include "library.h"

namespace lockstep {

int64_t lane_open(int64_t rank, int64_t ring, int64_t spin_ns, std::vector<int64_t> segments,
                  std::vector<int64_t> processes) {
  TORCH_CHECK(segments.size() == processes.size() && rank >= 0 &&
                  rank < static_cast<int64_t>(segments.size()),
              "lane_open: a segment and a process of every rank");
  return reinterpret_cast<int64_t>(new Lane(rank, ring, spin_ns, segments, processes));
}

void lane_close(int64_t lane) { delete reinterpret_cast<Lane*>(lane); }

int64_t lane_start(int64_t lane, int64_t kind, const at::Tensor& send, std::vector<int64_t> send_at,
                   std::vector<int64_t> send_bytes, const at::Tensor& into,
                   std::vector<int64_t> recv_bytes) {
  TORCH_CHECK(send.is_cpu() && into.is_cpu() && send.is_contiguous() && into.is_contiguous(),
              "lane_start: contiguous tensors in host memory");
  Lane& end = *reinterpret_cast<Lane*>(lane);
  const size_t size = end.size();
  TORCH_CHECK(send_at.size() == size && send_bytes.size() == size && recv_bytes.size() == size,
              "lane_start: a part to and from each of ", size, " ranks");
  const int64_t room = send.nbytes();
  for (size_t rank = 0; rank < size; ++rank)
    TORCH_CHECK(send_at[rank] >= 0 && send_bytes[rank] >= 0 && recv_bytes[rank] >= 0 &&
                    send_at[rank] + send_bytes[rank] <= room,
                "lane_start: what goes to rank ", rank, " is not within the ", room, " bytes sent");
  const int64_t received = std::accumulate(recv_bytes.begin(), recv_bytes.end(), int64_t{0});
  TORCH_CHECK(received <= static_cast<int64_t>(into.nbytes()), "lane_start: ", received,
              " bytes do not fit into ", into.nbytes());
  TORCH_CHECK(send_bytes[end.rank()] == recv_bytes[end.rank()],
              "lane_start: a rank's own part is as long on both sides");
  return end.start(static_cast<uint32_t>(kind), static_cast<const char*>(send.const_data_ptr()),
                   send_at, send_bytes, static_cast<char*>(into.data_ptr()), recv_bytes);
}

void lane_wait(int64_t lane, int64_t number, int64_t timeout_ns) {
  reinterpret_cast<Lane*>(lane)->wait(number, timeout_ns);
}

}  // namespace lockstep
