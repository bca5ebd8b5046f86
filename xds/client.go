package xds

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/tunnel/complaints"
	"github.com/ztun/ztun/tunnel/token"
)

const (
	minDelay = 10 * time.Millisecond
	maxDelay = 15 * time.Second
	// A stream that lived this long was a good one: the next attempt comes at once.
	goodStream = 10 * time.Second
	// For so long after the start nothing that fails is a warning.
	quietStart = 5 * time.Second
)

// A Client keeps one stream to the control plane, see the package.
type Client struct {
	// Set by New, read-only after.
	config Config
	node   *corev3.Node
	log    *slog.Logger
	ready  chan struct{}
	sleep  func(context.Context, time.Duration) // Replaced in tests.

	counters counters

	// Owned by Run; the subscriptions' counters are atomic.
	subs     []*subscription
	streams  int // Opened or tried, for the log.
	isReady  bool
	began    time.Time
	answered bool           // By any stream.
	roots    *x509.CertPool // Of the last connection.
	hasRoots bool           // A nil pool means the system's.
	toldOnce bool           // that something fails at the start
	ends     complaints.Book
	rootEnds complaints.Book
}

// New checks the configuration. Nothing happens before Run.
func New(config Config) (*Client, error) {
	config.setDefaults()
	if err := config.validate(); err != nil {
		return nil, fmt.Errorf("xds: configuration: %w", err)
	}
	node, err := config.Node.proto()
	if err != nil {
		return nil, fmt.Errorf("xds: configuration: %w", err)
	}
	c := &Client{
		config: config,
		node:   node,
		log:    config.Log,
		ready:  make(chan struct{}),
		sleep:  sleep,
	}
	for _, s := range config.Subscriptions {
		c.subs = append(c.subs, newSubscription(s, &c.config.Limits))
	}
	return c, nil
}

// Ready is closed when every subscription has had a response without a
// rejection. It stays closed.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// Run keeps a stream until ctx ends, and returns its cause. It must be called
// once. What the handlers hold survives a lost stream.
func (c *Client) Run(ctx context.Context) error {
	delay := minDelay
	c.began = time.Now()
	for {
		c.streams++
		started := time.Now()
		end, err := c.stream(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.counters.terminations[end].Add(1)
		now := time.Now()
		lived := now.Sub(started)
		if delay = min(2*delay, maxDelay); lived >= goodStream && end != ConnectionError {
			delay = minDelay
		}
		c.log.Log(ctx, c.level(end, err, now), "stream to the control plane ended",
			"id", c.streams, "reason", end.String(), slog.Any("error", err), "lived", lived, "retry_within", delay)
		// Every path comes through here: nothing reconnects without a pause.
		c.sleep(ctx, delay/2+rand.N(delay/2+1))
	}
}

// level is that of the line for the end of a stream. An ordinary end is no
// news; what goes on failing is told now and then; and for a moment after the
// start nobody is to be alarmed, since the control plane may not have heard of
// our pod yet, nor our node of its Service.
func (c *Client) level(end Termination, err error, now time.Time) slog.Level {
	quiet := !c.answered && now.Sub(c.began) < quietStart
	switch {
	case end == Reconnect || end == Complete:
		return slog.LevelInfo
	case quiet && !c.toldOnce:
		c.toldOnce = true
		return slog.LevelInfo
	case quiet || !c.ends.News(err, now):
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// stream opens one stream and serves it until it ends. One goroutine does all
// of it: each response is applied and answered before the next is read.
func (c *Client) stream(ctx context.Context) (Termination, error) {
	conn, err := c.connect()
	if err != nil {
		return Error, err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, err = c.authorize(ctx)
	if err != nil {
		return Error, err
	}
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return ConnectionError, fmt.Errorf("xds: connect to %s: %w", c.config.Address, err)
	}
	c.counters.connected.Store(true)
	defer c.counters.connected.Store(false)
	err = c.serve(stream)
	end := classify(err)
	err = fmt.Errorf("xds: stream to %s: %w", c.config.Address, err)
	if sent, _ := metadata.FromOutgoingContext(ctx); status.Code(err) == codes.Unauthenticated && len(sent.Get("authorization")) > 0 {
		// The server does not tell a token that it does not know from one that is
		// for somebody else.
		err = fmt.Errorf("%w (%s)", err, token.Describe(strings.TrimPrefix(sent.Get("authorization")[0], bearer), time.Now()))
	}
	return end, err
}

// connect prepares a connection with the roots as they are now, or else as
// they were.
func (c *Client) connect() (*grpc.ClientConn, error) {
	roots, err := loadRoots(c.config.RootCA)
	switch {
	case err == nil:
		c.roots, c.hasRoots, c.rootEnds = roots, true, complaints.Book{}
	case !c.hasRoots:
		return nil, err
	case c.rootEnds.News(err, time.Now()):
		c.log.Warn("root certificates of the control plane not reloaded; the earlier ones serve on", "error", err)
	}
	return c.config.connect(c.roots)
}

const bearer = "Bearer "

// authorize adds what every request carries.
func (c *Client) authorize(ctx context.Context) (context.Context, error) {
	md := metadata.MD{}
	for _, h := range c.config.Headers {
		md.Append(h[0], h[1])
	}
	if c.config.Token != nil {
		token, err := c.config.Token()
		if err != nil {
			return nil, err
		}
		if err := checkHeader("authorization", token); err != nil {
			return nil, errors.New("xds: token is not printable ASCII")
		}
		md.Set("authorization", bearer+token)
		md.Set("clusterid", c.config.ClusterID)
	}
	return metadata.NewOutgoingContext(ctx, md), nil
}

type deltaStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

func (c *Client) serve(stream deltaStream) error {
	for _, sub := range c.subs {
		req := sub.initial()
		req.Node = c.node
		if err := send(stream, req); err != nil {
			return err
		}
	}
	for first := true; ; first = false {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if first {
			// Not before: an istiod that refuses us lets us open the stream too.
			c.log.Info("stream to the control plane opened", "id", c.streams, "address", c.config.Address)
			c.answered, c.ends = true, complaints.Book{}
			if c.config.Answered != nil {
				c.config.Answered()
			}
		}
		if err := send(stream, c.handle(resp)); err != nil {
			return err
		}
	}
}

// send returns the stream's status where gRPC's Send only says io.EOF.
func send(stream deltaStream, req *discoveryv3.DeltaDiscoveryRequest) error {
	err := stream.Send(req)
	for errors.Is(err, io.EOF) {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
	return err
}

// handle applies one response and returns the ACK or NACK for it.
func (c *Client) handle(resp *discoveryv3.DeltaDiscoveryResponse) *discoveryv3.DeltaDiscoveryRequest {
	reply := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
	sub := c.subscription(resp.GetTypeUrl())
	if sub == nil {
		c.counters.unknown.Add(1)
		c.log.Error("response of a type that was not asked for", "type", fmt.Sprintf("%.128s", resp.GetTypeUrl()))
		return reply
	}
	rejected := sub.apply(resp)
	if len(rejected) > 0 {
		reply.ErrorDetail = nack(rejected)
		c.log.Warn("resources rejected", "type", sub.Type, "count", len(rejected), "detail", reply.ErrorDetail.GetMessage())
	}
	c.checkReady()
	return reply
}

func (c *Client) subscription(typeURL string) *subscription {
	for _, s := range c.subs {
		if s.Type == typeURL {
			return s
		}
	}
	return nil
}

func (c *Client) checkReady() {
	if c.isReady {
		return
	}
	for _, s := range c.subs {
		if !s.warm {
			return
		}
	}
	c.isReady = true
	close(c.ready)
}

func classify(err error) Termination {
	if errors.Is(err, io.EOF) {
		return Complete
	}
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unknown, codes.Canceled, codes.DeadlineExceeded:
		return Reconnect
	case codes.Unavailable:
		for _, text := range []string{"transport is closing", "received prior goaway"} {
			if strings.Contains(s.Message(), text) {
				return Reconnect
			}
		}
	}
	return Error
}
