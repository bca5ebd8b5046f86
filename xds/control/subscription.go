package control

import (
	"maps"
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// subscription is what one stream wants of one type, and what it has been told.
// Owned by its stream.
type subscription struct {
	typeURL string
	node    string // its workloads are sent unasked

	wildcard bool
	names    map[string]bool   // asked for by name, uid or alias
	known    map[string]string // what the client has: version by name
	fresh    map[string]bool   // names that were asked for and not answered yet
	answer   bool              // the first request is owed a response, even an empty one
	nonce    string            // of the response that is not acknowledged yet
	seen     *World            // the world whose resources the client has
	swept    *World            // the world that known holds nothing beside of
}

// has says whether the client has been sent all resources of w that it wants. A
// nil subscription wants none.
func (sub *subscription) has(w *World) bool {
	return sub == nil || (sub.seen == w && len(sub.fresh) == 0)
}

// first starts a subscription with the first request of its type on a stream.
// "an empty list of resource_names_subscribe ... wildcard"
// https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#how-the-client-specifies-what-resources-to-return
func first(req *discovery.DeltaDiscoveryRequest, node string) *subscription {
	sub := &subscription{
		typeURL: req.GetTypeUrl(), node: node,
		wildcard: len(req.GetResourceNamesSubscribe())+len(req.GetResourceNamesUnsubscribe()) == 0,
		names:    make(map[string]bool),
		known:    make(map[string]string),
		fresh:    make(map[string]bool),
		answer:   true,
	}
	sub.change(req)
	for name, version := range req.GetInitialResourceVersions() {
		if version != "" {
			sub.known[name] = version
		}
		if !sub.wildcard {
			sub.names[name] = true
			if version == "" {
				sub.fresh[name] = true
			}
		}
	}
	return sub
}

// change applies a request's lists.
func (sub *subscription) change(req *discovery.DeltaDiscoveryRequest) {
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" {
			sub.wildcard, sub.seen, sub.swept = true, nil, nil
			continue
		}
		sub.names[name], sub.fresh[name] = true, true
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		// What else the name brought, a service's workloads, the client does not
		// know to forget: it is told.
		sub.swept = nil
		if name == "*" {
			sub.wildcard = false
			continue
		}
		delete(sub.names, name)
		delete(sub.fresh, name)
	}
}

// wanted are the names of the resources the client wants and that exist.
func (sub *subscription) wanted(w *World) map[string]bool {
	wanted := make(map[string]bool)
	add := func(names []string) {
		for _, n := range names {
			wanted[n] = true
		}
	}
	if sub.wildcard {
		add(w.names[sub.typeURL])
		return wanted
	}
	if sub.typeURL == typeAddress {
		add(w.byNode[sub.node])
	}
	for name := range sub.names {
		add(w.resolve(sub.typeURL, name))
	}
	return wanted
}

// next is the response that brings the client from what it has to w; nil when
// there is nothing to say. It counts as told from then on. Without removals,
// what is gone is left for later.
func (sub *subscription) next(w *World, removals bool) *discovery.DeltaDiscoveryResponse {
	removals = removals && sub.swept != w
	if sub.has(w) && !sub.answer && !removals {
		return nil
	}
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: sub.typeURL}
	wanted := sub.wanted(w)
	asked := make(map[string]bool)
	for name := range sub.fresh {
		found := w.resolve(sub.typeURL, name)
		for _, n := range found {
			asked[n] = true
		}
		if len(found) == 0 {
			resp.RemovedResources = append(resp.RemovedResources, name)
			delete(sub.known, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		r := w.resources[sub.typeURL][name]
		if sub.known[name] == r.version && !asked[name] {
			continue
		}
		sub.known[name] = r.version
		resp.Resources = append(resp.Resources, &discovery.Resource{Name: r.name, Aliases: r.aliases, Version: r.version, Resource: r.body})
	}
	if removals {
		for name := range sub.known {
			if !wanted[name] {
				resp.RemovedResources = append(resp.RemovedResources, name)
				delete(sub.known, name)
			}
		}
		sub.swept = w
	}
	slices.Sort(resp.RemovedResources)
	clear(sub.fresh)
	owed := sub.answer
	sub.seen, sub.answer = w, false
	if len(resp.Resources)+len(resp.RemovedResources) == 0 && !owed {
		return nil
	}
	return resp
}
