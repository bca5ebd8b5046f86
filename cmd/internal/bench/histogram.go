package main

import (
	"math/bits"
	"time"
)

// A histogram counts durations in buckets that are less than 1/32 of their
// value wide. The zero value is empty.
type histogram struct {
	// Counts by bucket, as long as the highest bucket in use.
	Counts []uint64 `json:"counts"`
}

// subBuckets is how many buckets a power of two has.
const subBuckets = 32

// bucketOf returns the bucket of a duration. Those below 64 ns have one each.
func bucketOf(d time.Duration) int {
	n := uint64(max(d, 0))
	shift := max(0, bits.Len64(n)-6)
	return shift*subBuckets + int(n>>shift)
}

// middle returns the middle of a bucket.
func middle(bucket int) time.Duration {
	if bucket < 2*subBuckets {
		return time.Duration(bucket)
	}
	shift := bucket/subBuckets - 1
	low := uint64(bucket-shift*subBuckets) << shift
	return time.Duration(low + 1<<shift/2)
}

func (h *histogram) record(d time.Duration) {
	b := bucketOf(d)
	for len(h.Counts) <= b {
		h.Counts = append(h.Counts, 0)
	}
	h.Counts[b]++
}

func (h *histogram) merge(other *histogram) {
	for len(h.Counts) < len(other.Counts) {
		h.Counts = append(h.Counts, 0)
	}
	for b, n := range other.Counts {
		h.Counts[b] += n
	}
}

func (h *histogram) total() uint64 {
	var sum uint64
	for _, n := range h.Counts {
		sum += n
	}
	return sum
}

// quantile returns the duration that a share q of all recorded ones do not
// exceed; 0 if none was recorded.
func (h *histogram) quantile(q float64) time.Duration {
	rank := max(1, uint64(q*float64(h.total())+0.5))
	var sum uint64
	for b, n := range h.Counts {
		if sum += n; sum >= rank {
			return middle(b)
		}
	}
	return 0
}
