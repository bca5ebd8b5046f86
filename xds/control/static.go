package control

import (
	"maps"
	"sync"
)

// Static is a directory held in memory. The zero value is an empty directory.
type Static struct {
	mu sync.Mutex
	// mu guards the fields below.
	files   map[string]string
	changed chan struct{} // one slot
}

// NewStatic returns a directory of the given files, content by name. Names
// count as in a real directory: only .yaml, .yml and .json are read.
func NewStatic(files map[string]string) *Static {
	s := &Static{}
	s.Set(files)
	return s
}

// Set replaces all files. A Server that serves s reads it again.
func (s *Static) Set(files map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = maps.Clone(files)
	select {
	case s.wake() <- struct{}{}:
	default:
	}
}

func (s *Static) wake() chan struct{} {
	if s.changed == nil {
		s.changed = make(chan struct{}, 1)
	}
	return s.changed
}

// changes tells of calls to Set; it is read by one Server only.
func (s *Static) changes() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wake()
}

func (s *Static) snapshot() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.files)
}
