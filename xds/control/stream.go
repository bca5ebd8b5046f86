package control

import (
	"context"
	"errors"
	"io"
	"maps"
	"strconv"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	maxNacks        = 64
	maxMessageBytes = 4 << 10 // of a NACK, as kept
)

// discoveryService is the ADS server. There is no state-of-the-world variant.
type discoveryService struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	srv *Server
}

// DeltaAggregatedResources serves one proxy until it leaves, its token expires,
// or the server stops.
func (d discoveryService) DeltaAggregatedResources(ads discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s := d.srv
	who, err := s.authenticate(ads.Context())
	if err != nil {
		return err
	}
	st := &stream{srv: s, who: who, ads: ads, subs: make(map[string]*subscription), reqs: make(chan *discovery.DeltaDiscoveryRequest)}
	if err := s.enter(st); err != nil {
		return err
	}
	defer s.leave(st)

	// A client that does not read keeps run inside Send, out of reach of the
	// token's end; returning from here ends the stream, and with it Send.
	result := make(chan error, 2)
	s.streams.Go(func() { result <- st.receive(ads.Context()) })
	s.streams.Go(func() { result <- st.run(ads.Context()) })
	expiry := time.NewTimer(who.expires.Sub(s.cfg.Now()))
	defer expiry.Stop()
	select {
	case err = <-result:
	case <-expiry.C:
		err = status.Error(codes.Unauthenticated, "the token expired while the stream was open")
	case <-s.stopping:
		err = status.Error(codes.Unavailable, "the control plane is stopping")
	}
	s.log.Info("proxy left", "node", who.node, "remote", who.remote, "reason", err)
	return err
}

// stream is one proxy's ADS stream.
type stream struct {
	srv  *Server
	who  caller
	ads  discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	reqs chan *discovery.DeltaDiscoveryRequest

	// Owned by run.
	subs   map[string]*subscription
	nonces uint64

	// Guarded by srv.mu.
	client Client
}

// receive hands requests to run, one at a time: a proxy that sends faster than
// it is served is slowed down by flow control.
func (st *stream) receive(ctx context.Context) error {
	for {
		req, err := st.ads.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case st.reqs <- req:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run answers requests and pushes changes. There is at most one response of a
// type under way: while a client is busy with it, worlds pass, and what it gets
// next is the difference to the latest one. Nothing queues up.
func (st *stream) run(ctx context.Context) error {
	for {
		world, changed := st.srv.current()
		if err := st.pushAll(world); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case req := <-st.reqs:
			if err := st.handle(req); err != nil {
				return err
			}
		}
	}
}

// pushAll sends what is new. A policy is there before the first workload that
// names it, and goes after the last one has stopped: between the two a proxy
// would refuse connections, for a policy it does not know. istiod sends all
// workloads first; a proxy cannot tell, since it must take them in any order.
func (st *stream) pushAll(w *World) error {
	if w == nil {
		return nil
	}
	addresses, policies := st.subs[typeAddress], st.subs[typeAuthorization]
	if err := st.push(policies, w, false); err != nil || !policies.has(w) {
		return err
	}
	if err := st.push(addresses, w, true); err != nil || !addresses.has(w) {
		return err
	}
	return st.push(policies, w, true)
}

func (st *stream) push(sub *subscription, w *World, removals bool) error {
	if sub == nil || sub.nonce != "" {
		return nil
	}
	resp := sub.next(w, removals)
	if resp == nil {
		return nil
	}
	st.nonces++
	sub.nonce = strconv.FormatUint(st.nonces, 10)
	resp.Nonce = sub.nonce
	if err := st.ads.Send(resp); err != nil {
		return err
	}
	st.srv.count(st, func(c *Client) { c.Sent[shortType(sub.typeURL)]++ })
	return nil
}

// handle takes one request: the first of its type, a change of what is wanted,
// an acknowledgement, or several of these at once.
func (st *stream) handle(req *discovery.DeltaDiscoveryRequest) error {
	if err := st.checkNode(req); err != nil {
		return err
	}
	typeURL := req.GetTypeUrl()
	if typeURL != typeAddress && typeURL != typeAuthorization {
		return status.Errorf(codes.InvalidArgument, "resources of type %q are not served", clip(typeURL, 128))
	}
	sub := st.subs[typeURL]
	if sub == nil {
		st.subs[typeURL] = first(req, st.who.node)
		return st.checkSize()
	}
	sub.change(req)
	if sub.nonce != "" && req.GetResponseNonce() == sub.nonce {
		sub.nonce = ""
		if detail := req.GetErrorDetail(); detail != nil {
			st.srv.noteNack(st, typeURL, detail.GetMessage())
		} else {
			st.srv.count(st, func(c *Client) { c.Acked[shortType(typeURL)]++ })
		}
	}
	return st.checkSize()
}

// checkNode refuses a proxy that says it runs on another node than its token's.
func (st *stream) checkNode(req *discovery.DeltaDiscoveryRequest) error {
	node := req.GetNode()
	if node == nil {
		return nil
	}
	st.srv.count(st, func(c *Client) { c.NodeID = clip(node.GetId(), 256) })
	claimed := node.GetMetadata().GetFields()["NODE_NAME"].GetStringValue()
	if claimed == "" || claimed == st.who.node {
		return nil
	}
	st.srv.log.Warn("proxy refused", "node", st.who.node, "claims", clip(claimed, 256), "remote", st.who.remote)
	return status.Errorf(codes.PermissionDenied, "the token is for node %s, the proxy says %s", st.who.node, clip(claimed, 256))
}

func (st *stream) checkSize() error {
	total := 0
	for _, sub := range st.subs {
		total += len(sub.names)
	}
	if limit := st.srv.cfg.Limits.Names; total > limit {
		return status.Errorf(codes.ResourceExhausted, "more than %d names", limit)
	}
	return nil
}

// shortType is the last part of a type URL's name.
func shortType(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// enter registers a stream, unless its node has too many.
func (s *Server) enter(st *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for other := range s.clients {
		if other.who.node == st.who.node {
			n++
		}
	}
	if n >= s.cfg.Limits.StreamsPerNode {
		return status.Errorf(codes.ResourceExhausted, "node %s has %d streams already", st.who.node, n)
	}
	st.client = Client{
		Node: st.who.node, Remote: st.who.remote, Since: s.cfg.Now(), TokenExpires: st.who.expires,
		Sent: make(map[string]uint64), Acked: make(map[string]uint64), Nacked: make(map[string]uint64),
	}
	s.clients[st] = true
	s.log.Info("proxy connected", "node", st.who.node, "remote", st.who.remote)
	return nil
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients, st)
}

func (s *Server) count(st *stream, change func(*Client)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&st.client)
}

// noteNack logs and keeps what a proxy could not use.
func (s *Server) noteNack(st *stream, typeURL, message string) {
	n := Nack{At: s.cfg.Now(), Node: st.who.node, Type: shortType(typeURL), Message: clip(message, maxMessageBytes)}
	s.log.Warn("proxy rejected resources", "node", n.Node, "type", n.Type, "reason", n.Message)
	s.mu.Lock()
	defer s.mu.Unlock()
	st.client.Nacked[n.Type]++
	if s.nacks = append(s.nacks, n); len(s.nacks) > maxNacks {
		s.nacks = s.nacks[len(s.nacks)-maxNacks:]
	}
}

// snapshot copies what a Client holds by reference.
func (c Client) snapshot() Client {
	c.Sent, c.Acked, c.Nacked = maps.Clone(c.Sent), maps.Clone(c.Acked), maps.Clone(c.Nacked)
	return c
}
