package xds

import (
	"errors"
	"fmt"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
)

var (
	errNoBody      = errors.New("resource without a body")
	errTooLong     = errors.New("name or version too long")
	errTooLarge    = errors.New("resource too large")
	errTooMany     = errors.New("too many resources")
	errTotalTooBig = errors.New("resources too large together")
)

// A subscription is what the server has told of one type. Owned by Run.
type subscription struct {
	Subscription
	limits   *Limits
	counters typeCounters

	// known are the resources that the handler holds, as last accepted.
	known map[string]known
	bytes int
	// refused are names that the handler rejected and holds no older version
	// of; it may hold a note that they exist.
	refused map[string]struct{}
	// unechoed are the names that this stream's first request left out although
	// the handler knows them. The server sends what it has of them at once, so
	// what its first response does not name is gone.
	unechoed map[string]struct{}
	// warm is set by the first response without a rejection.
	warm bool
}

type known struct {
	version string
	bytes   int
}

func newSubscription(s Subscription, limits *Limits) *subscription {
	return &subscription{
		Subscription: s,
		limits:       limits,
		known:        make(map[string]known),
		refused:      make(map[string]struct{}),
	}
}

// initial is the first request of a stream, less the node: a wildcard, with
// the versions we hold. A resource whose last version was rejected is given
// with the version that was kept, or left out if none was, so that the server
// sends it again.
func (s *subscription) initial() *discoveryv3.DeltaDiscoveryRequest {
	s.unechoed = make(map[string]struct{})
	versions := make(map[string]string, len(s.known))
	size := 0
	for name, k := range s.known {
		if size += len(name) + len(k.version) + 16; size > maxInitialVersions {
			s.unechoed[name] = struct{}{}
			continue
		}
		versions[name] = k.version
	}
	for name := range s.refused {
		s.unechoed[name] = struct{}{}
	}
	return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: s.Type, InitialResourceVersions: versions}
}

// apply hands a response to the handler and returns what was rejected.
func (s *subscription) apply(resp *discoveryv3.DeltaDiscoveryResponse) []Rejection {
	s.counters.messages.Add(1)
	var rejected []Rejection
	added := make([]Resource, 0, len(resp.GetResources()))
	sizes := make(map[string]int, len(resp.GetResources()))
	room := newRoom(s)
	for _, r := range resp.GetResources() {
		body := r.GetResource().GetValue()
		s.counters.bytes.Add(uint64(len(body)))
		delete(s.unechoed, r.GetName())
		if err := room.admit(r, len(body)); err != nil {
			rejected = append(rejected, Rejection{r.GetName(), err})
			continue
		}
		sizes[r.GetName()] = len(body)
		added = append(added, Resource{Name: r.GetName(), Version: r.GetVersion(), Body: body})
	}
	removed := resp.GetRemovedResources()
	if len(s.unechoed) > 0 {
		removed = append(make([]string, 0, len(removed)+len(s.unechoed)), removed...)
		for name := range s.unechoed {
			removed = append(removed, name)
		}
	}
	s.unechoed = nil
	refused := s.Handler.Apply(added, removed)
	s.remember(added, sizes, removed, refused)
	rejected = append(rejected, refused...)
	s.counters.rejected.Add(uint64(len(rejected)))
	s.counters.known.Store(int64(len(s.known)))
	s.warm = s.warm || len(rejected) == 0
	return rejected
}

func (s *subscription) remember(added []Resource, sizes map[string]int, removed []string, refused []Rejection) {
	bad := make(map[string]struct{}, len(refused))
	for _, r := range refused {
		bad[r.Name] = struct{}{}
	}
	for _, r := range added {
		if _, ok := bad[r.Name]; ok {
			if _, held := s.known[r.Name]; !held {
				s.refused[r.Name] = struct{}{}
			}
			continue
		}
		s.bytes += sizes[r.Name] - s.known[r.Name].bytes
		s.known[r.Name] = known{r.Version, sizes[r.Name]}
		delete(s.refused, r.Name)
	}
	for _, name := range removed {
		s.bytes -= s.known[name].bytes
		delete(s.known, name)
		delete(s.refused, name)
	}
}

// A room follows what one response would add to what is held.
type room struct {
	sub   *subscription
	fresh map[string]struct{} // Names that are not held yet.
	bytes int
}

func newRoom(s *subscription) *room {
	return &room{sub: s, fresh: make(map[string]struct{}), bytes: s.bytes}
}

func (m *room) admit(r *discoveryv3.Resource, size int) error {
	s, name := m.sub, r.GetName()
	old, held := s.known[name]
	_, refused := s.refused[name]
	_, again := m.fresh[name]
	switch {
	case r.GetResource() == nil:
		return errNoBody
	case len(name) > maxName || len(r.GetVersion()) > maxVersion:
		return errTooLong
	case size > s.limits.ResourceBytes:
		return errTooLarge
	case m.bytes+size-old.bytes > s.limits.TotalBytes:
		return errTotalTooBig
	case !held && !refused && !again && len(s.known)+len(s.refused)+len(m.fresh) >= s.limits.Resources:
		return errTooMany
	}
	if !held && !refused {
		m.fresh[name] = struct{}{}
	}
	m.bytes += size - old.bytes
	return nil
}

// nack says what was rejected, as "name: reason; name: reason".
func nack(rejected []Rejection) *statuspb.Status {
	var b strings.Builder
	for i, r := range rejected {
		item := fmt.Sprintf("%.256s: %.512s", r.Name, r.Err)
		if b.Len()+len(item) > maxNackMessage {
			fmt.Fprintf(&b, "; and %d more", len(rejected)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(item)
	}
	return &statuspb.Status{Message: strings.ToValidUTF8(b.String(), "?")}
}
