package admin

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Readiness is ready when no task is pending. The zero value is ready.
type Readiness struct {
	// mu guards the field below.
	mu      sync.Mutex
	pending map[string]struct{}
}

// Set makes the task pending, or done.
func (r *Readiness) Set(task string, done bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if done {
		delete(r.pending, task)
		return
	}
	if r.pending == nil {
		r.pending = map[string]struct{}{}
	}
	r.pending[task] = struct{}{}
}

// Pending are the tasks that are not done, sorted.
func (r *Readiness) Pending() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	tasks := make([]string, 0, len(r.pending))
	for t := range r.pending {
		tasks = append(tasks, t)
	}
	slices.Sort(tasks)
	return tasks
}

// Handler answers GET /healthz/ready.
func (r *Readiness) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case req.URL.Path != "/healthz/ready":
			http.NotFound(w, req)
		case req.Method != http.MethodGet:
			w.WriteHeader(http.StatusMethodNotAllowed)
		default:
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			if tasks := r.Pending(); len(tasks) > 0 {
				w.WriteHeader(http.StatusInternalServerError)
				fmt.Fprintf(w, "not ready, pending: %s", strings.Join(tasks, ", "))
				return
			}
			fmt.Fprint(w, "ready\n")
		}
	})
}
